//! The protocol's log settings as a filter of events, and back.

use std::collections::HashMap;

use isthmus_proto::inference::log_settings_request::SettingValue;
use isthmus_proto::inference::log_settings_request::setting_value::ParameterChoice;
use isthmus_proto::inference::log_settings_response::{self, setting_value};

use crate::ServerError;

/// A filter as in `RUST_LOG`: `log_filter` says it; `log_verbose_level` is 1 for debug and 2 for trace; `log_info`, `log_warning`,
/// `log_error` switched off leave what is graver. Settings that are not named stay as they are in the filter `current`.
///
/// # Errors
/// [`ServerError::Invalid`] for other settings or values.
pub fn filter(settings: &HashMap<String, SettingValue>, current: &str) -> Result<String, ServerError> {
    let before = Levels::of(current);
    let Levels { mut verbose, mut info, mut warning, mut error } = before;
    let mut said = None;
    for (name, value) in settings {
        match (name.as_str(), &value.parameter_choice) {
            ("log_filter", Some(ParameterChoice::StringParam(filter))) => said = Some(filter.clone()),
            ("log_verbose_level", Some(ParameterChoice::Uint32Param(v))) => verbose = (*v).min(2),
            ("log_error", Some(ParameterChoice::BoolParam(on))) => error = *on,
            ("log_warning", Some(ParameterChoice::BoolParam(on))) => warning = *on,
            ("log_info", Some(ParameterChoice::BoolParam(on))) => info = *on,
            _ => {
                let why = "settings are log_filter (string), log_verbose_level (uint32), log_info, log_warning and log_error (bool)";
                return Err(ServerError::Invalid(why.into()));
            }
        }
    }
    let after = Levels { verbose, info, warning, error };
    // the gravest that is switched off decides
    let level = match after {
        Levels { verbose: 1, .. } => "debug",
        Levels { verbose: 2.., .. } => "trace",
        Levels { error: false, .. } => "off",
        Levels { warning: false, .. } => "error",
        Levels { info: false, .. } => "warn",
        _ => "info",
    };
    if let Some(said) = said {
        return Ok(said);
    }
    if after == before {
        return Ok(current.to_owned());
    }
    // what is said of single targets stays
    let targets = current.split(',').filter(|part| part.contains('='));
    Ok(targets.chain([level]).collect::<Vec<_>>().join(","))
}

/// What a filter lets through where it names no target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Levels {
    verbose: u32,
    info: bool,
    warning: bool,
    error: bool,
}

impl Levels {
    fn of(filter: &str) -> Self {
        let says = |level: &str| filter.split(',').any(|part| part.trim().eq_ignore_ascii_case(level));
        let (trace, debug) = (says("trace"), says("debug"));
        let info = trace || debug || says("info");
        let warning = info || says("warn");
        Self { verbose: if trace { 2 } else { u32::from(debug) }, info, warning, error: warning || says("error") }
    }
}

/// What is in force.
pub fn settings(filter: &str) -> HashMap<String, log_settings_response::SettingValue> {
    let Levels { verbose, info, warning, error } = Levels::of(filter);
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
        after(settings, "info")
    }

    fn after(settings: &[(&str, ParameterChoice)], current: &str) -> Result<String, ServerError> {
        let value = |c: &ParameterChoice| SettingValue { parameter_choice: Some(c.clone()) };
        filter(&settings.iter().map(|(name, c)| ((*name).to_owned(), value(c))).collect(), current)
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
        // what is not named stays
        assert_eq!(after(&[("log_warning", BoolParam(true))], "debug").unwrap(), "debug");
        assert_eq!(after(&[("log_error", BoolParam(true))], "warn").unwrap(), "warn");
        assert_eq!(after(&[("log_info", BoolParam(true))], "h2=warn,info").unwrap(), "h2=warn,info");
        assert_eq!(after(&[("log_verbose_level", Uint32Param(0))], "trace").unwrap(), "info");
        assert_eq!(after(&[("log_info", BoolParam(false))], "h2=debug,warn").unwrap(), "h2=debug,warn", "no louder than before");
        assert_eq!(after(&[("log_info", BoolParam(false))], "h2=debug,info").unwrap(), "h2=debug,warn");
        assert_eq!(after(&[("log_info", BoolParam(true))], "off").unwrap(), "off", "errors and warnings stay off");
        let verbose = |filter| settings(filter)["log_verbose_level"].parameter_choice.clone();
        assert_eq!(verbose("offload_server=debug,info"), Some(setting_value::ParameterChoice::Uint32Param(0)));
        assert_eq!(verbose("h2=warn,debug"), Some(setting_value::ParameterChoice::Uint32Param(1)));
        assert_eq!(verbose("warn"), Some(setting_value::ParameterChoice::Uint32Param(0)));
    }
}
