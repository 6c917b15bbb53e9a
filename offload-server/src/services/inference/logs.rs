//! The protocol's log settings as a filter of events, and back.

use std::collections::HashMap;

use isthmus_proto::inference::log_settings_request::SettingValue;
use isthmus_proto::inference::log_settings_request::setting_value::ParameterChoice;
use isthmus_proto::inference::log_settings_response::{self, setting_value};

use crate::ServerError;

/// A filter as in `RUST_LOG`: `log_filter` says it; `log_verbose_level` is 1 for debug and 2 for trace; `log_info`, `log_warning`,
/// `log_error` switched off leave what is graver.
///
/// # Errors
/// [`ServerError::Invalid`] for other settings or values.
pub fn filter(settings: &HashMap<String, SettingValue>) -> Result<String, ServerError> {
    let (mut said, mut verbose, mut level) = (None, 0, "info");
    let mut names: Vec<&String> = settings.keys().collect();
    // errors before info before warnings: the gravest that is switched off decides
    names.sort();
    let mut off = 3;
    for name in names {
        match (name.as_str(), &settings[name].parameter_choice) {
            ("log_filter", Some(ParameterChoice::StringParam(filter))) => said = Some(filter.clone()),
            ("log_verbose_level", Some(ParameterChoice::Uint32Param(v))) => verbose = *v,
            ("log_error" | "log_warning" | "log_info", Some(ParameterChoice::BoolParam(true))) => {}
            ("log_error", Some(ParameterChoice::BoolParam(false))) => off = 0,
            ("log_warning", Some(ParameterChoice::BoolParam(false))) => off = off.min(1),
            ("log_info", Some(ParameterChoice::BoolParam(false))) => off = off.min(2),
            _ => {
                let why = "settings are log_filter (string), log_verbose_level (uint32), log_info, log_warning and log_error (bool)";
                return Err(ServerError::Invalid(why.into()));
            }
        }
    }
    match (verbose, off) {
        (0, 0) => level = "off",
        (0, 1) => level = "error",
        (0, 2) => level = "warn",
        (0, _) => {}
        (1, _) => level = "debug",
        _ => level = "trace",
    }
    Ok(said.unwrap_or_else(|| level.to_owned()))
}

/// What is in force.
pub fn settings(filter: &str) -> HashMap<String, log_settings_response::SettingValue> {
    let says = |level: &str| filter.split(',').any(|part| part.rsplit('=').next().is_some_and(|l| l.eq_ignore_ascii_case(level)));
    let (trace, debug) = (says("trace"), says("debug"));
    let info = trace || debug || says("info");
    let warning = info || says("warn");
    let error = warning || says("error");
    let verbose = if trace { 2 } else { u32::from(debug) };
    let value = |choice| log_settings_response::SettingValue { parameter_choice: Some(choice) };
    HashMap::from([
        ("log_filter".to_owned(), value(setting_value::ParameterChoice::StringParam(filter.to_owned()))),
        ("log_verbose_level".to_owned(), value(setting_value::ParameterChoice::Uint32Param(verbose))),
        ("log_info".to_owned(), value(setting_value::ParameterChoice::BoolParam(info))),
        ("log_warning".to_owned(), value(setting_value::ParameterChoice::BoolParam(warning))),
        ("log_error".to_owned(), value(setting_value::ParameterChoice::BoolParam(error))),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(settings: &[(&str, ParameterChoice)]) -> Result<String, ServerError> {
        let value = |c: &ParameterChoice| SettingValue { parameter_choice: Some(c.clone()) };
        filter(&settings.iter().map(|(name, c)| ((*name).to_owned(), value(c))).collect())
    }

    #[test]
    fn settings_become_filters() {
        use ParameterChoice::{BoolParam, StringParam, Uint32Param};
        assert_eq!(of(&[("log_verbose_level", Uint32Param(1))]).unwrap(), "debug");
        assert_eq!(of(&[("log_verbose_level", Uint32Param(9)), ("log_info", BoolParam(false))]).unwrap(), "trace");
        assert_eq!(of(&[("log_info", BoolParam(false)), ("log_warning", BoolParam(true))]).unwrap(), "warn");
        assert_eq!(of(&[("log_error", BoolParam(false)), ("log_warning", BoolParam(false))]).unwrap(), "off");
        assert_eq!(of(&[("log_info", BoolParam(true)), ("log_verbose_level", Uint32Param(0))]).unwrap(), "info");
        assert_eq!(of(&[("log_filter", StringParam("h2=warn".into()))]).unwrap(), "h2=warn");
        assert!(of(&[("log_file", StringParam("x".into()))]).is_err() && of(&[("log_info", Uint32Param(1))]).is_err());
        let verbose = |filter| settings(filter)["log_verbose_level"].parameter_choice.clone();
        assert_eq!(verbose("offload_server=debug,info"), Some(setting_value::ParameterChoice::Uint32Param(1)));
        assert_eq!(verbose("warn"), Some(setting_value::ParameterChoice::Uint32Param(0)));
    }
}
