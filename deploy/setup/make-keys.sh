#!/bin/sh
# Makes, once, the keys and certificates of docker-compose.yml in the volumes mounted below /keys: an authority for the servers and Envoy, three parties
# with their configurations, an operator's token, an authority that enrols clients, and one enrolled client.
#
# One place sees all keys here, so nothing is secret from whoever runs it: for trials. docs/deploying.md says how organisations do it.
set -eu
umask 077
cd /keys
if [ -e clients/.complete ]; then
  echo "keys are there already"
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# TLS of the servers and of Envoy
openssl ecparam -name prime256v1 -genkey -noout -out "$work/ca.key"
openssl req -x509 -new -key "$work/ca.key" -sha256 -days 365 -subj "/CN=Isthmus trial authority" \
  -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign" -out "$work/ca.pem"
certificate() { # NAME FOLDER OTHER-NAMES
  openssl ecparam -name prime256v1 -genkey -noout -out "$2/$1.key"
  openssl req -new -key "$2/$1.key" -subj "/CN=$1" -out "$work/$1.csr"
  printf 'subjectAltName=DNS:%s%s\nextendedKeyUsage=serverAuth\n' "$1" "$3" > "$work/$1.ext"
  openssl x509 -req -in "$work/$1.csr" -CA "$work/ca.pem" -CAkey "$work/ca.key" -CAcreateserial -sha256 -days 365 \
    -extfile "$work/$1.ext" -out "$2/$1.pem" 2>/dev/null
  cp "$work/ca.pem" "$2/ca.pem"
}
certificate offload-server servers ",DNS:offload-server-1,DNS:offload-server-2,DNS:localhost"
certificate envoy envoy ",DNS:localhost"
cp "$work/ca.pem" clients/ca.pem

# three parties: in earnest each makes its own, and none sees another's
rm -f clients/authority.key clients/operator.token clients/client.key clients/client.credential
authority=$(aggregator keys authority --out clients/authority.key)
operator=$(aggregator keys operator --out clients/operator.token)
for party in 0 1 2; do
  rm -rf "party$party/keys" "party$party/parties"
  aggregator keys party --party "$party" --url "https://aggregator-$party:50071" --host "aggregator-$party" --host localhost --out "party$party/keys" >/dev/null
done
for party in 0 1 2; do
  mkdir "party$party/parties"
  for other in 0 1 2; do cp "party$other/keys/public.toml" "party$party/parties/$other.toml"; done
  cat > "party$party/party.toml" <<END
task = "trial"
party = $party
listen = "0.0.0.0:50061"
peer_listen = "0.0.0.0:50071"
admin_listen = "0.0.0.0:9465"
data = "store.redb"
keys = "keys"
parties = ["parties/0.toml", "parties/1.toml", "parties/2.toml"]
authorities = ["$authority"]
operators = [$([ "$party" = 0 ] && printf '"%s"' "$operator")]
min_clients = 3
uploads_per_minute = 600
END
done
cp party0/keys/identity.pem clients/aggregator.pem
client=$(aggregator keys client --out clients/client.key)
aggregator keys enrol --authority clients/authority.key --client "$client" --days 365 --out clients/client.credential
touch clients/.complete
echo "keys made"
