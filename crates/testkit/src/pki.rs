//! A certificate authority of the test's own.

use std::path::Path;

/// An authority, which signs certificates.
pub struct Authority {
    params: rcgen::CertificateParams,
    key: rcgen::KeyPair,
    /// Its own certificate.
    pub pem: String,
}

/// A certificate with its key.
pub struct Signed {
    /// Certificate.
    pub pem: String,
    /// The same in DER.
    pub der: Vec<u8>,
    /// Private key, PEM.
    pub key: String,
}

impl Default for Authority {
    fn default() -> Self {
        Self::new()
    }
}

impl Authority {
    /// A new one.
    ///
    /// # Panics
    /// If there are no random numbers.
    pub fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        // the same name as those that it signs would make them look self-signed
        params.distinguished_name.push(rcgen::DnType::CommonName, "authority of a test");
        let key = rcgen::KeyPair::generate().expect("a key");
        let pem = params.self_signed(&key).expect("a certificate").pem();
        Self { params, key, pem }
    }

    /// A certificate for these names or addresses, valid between these years.
    ///
    /// # Panics
    /// If a name is none.
    pub fn sign_between(&self, names: &[&str], years: [i32; 2]) -> Signed {
        let mut params = rcgen::CertificateParams::new(names.iter().map(ToString::to_string).collect::<Vec<_>>()).expect("names");
        params.distinguished_name.push(rcgen::DnType::CommonName, names.first().copied().unwrap_or_default());
        [params.not_before, params.not_after] = years.map(|year| rcgen::date_time_ymd(year, 1, 1));
        let key = rcgen::KeyPair::generate().expect("a key");
        let issuer = rcgen::Issuer::from_params(&self.params, &self.key);
        let certificate = params.signed_by(&key, &issuer).expect("a certificate");
        Signed { pem: certificate.pem(), der: certificate.der().to_vec(), key: key.serialize_pem() }
    }

    /// A valid certificate for these names or addresses.
    ///
    /// # Panics
    /// If a name is none.
    pub fn sign(&self, names: &[&str]) -> Signed {
        self.sign_between(names, [2020, 2100])
    }

    /// Writes `ca.pem`, and for each of `names` NAME.pem and NAME.key, for that name, localhost and 127.0.0.1, into `folder`.
    ///
    /// # Panics
    /// If a file cannot be written.
    pub fn write(&self, folder: &Path, names: &[&str]) {
        std::fs::write(folder.join("ca.pem"), &self.pem).expect("ca.pem");
        for name in names {
            let signed = self.sign(&[name, "localhost", "127.0.0.1"]);
            std::fs::write(folder.join(format!("{name}.pem")), signed.pem).expect("a certificate");
            std::fs::write(folder.join(format!("{name}.key")), signed.key).expect("a key");
        }
    }
}
