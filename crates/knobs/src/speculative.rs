//! Speculative decoding is off, and asking for it is answered with the reason.

/// Why a draft or speculative flag is refused.
pub const SPECULATIVE_REASON: &str = "speculative decoding is off: a draft model competes with the main one for the same memory and \
     bandwidth, gains nothing once requests are batched, and makes memory use unpredictable";

/// llama.cpp's short forms; every other spelling is recognised by its words.
const SHORT: [&str; 8] = ["-md", "-hfd", "-hfrd", "-cd", "-devd", "-ngld", "-td", "-tbd"];

/// Whether a flag or a YAML key asks for speculative decoding or a draft model (`--draft-model`, `--enable-mtp`,
/// `--num-speculative-tokens`, `specprefillThreshold`, llama.cpp's `-md`, ...). `--flag=value` is looked at by its
/// name only; switches that turn it off (`--no-...`, `--disable-...`) do not ask for it.
#[must_use]
pub fn is_speculative(name: &str) -> bool {
    let name = name.split('=').next().unwrap_or_default();
    if SHORT.contains(&name) {
        return true;
    }
    if name.starts_with('-') && !name.starts_with("--") {
        return false;
    }
    let words = words(name);
    if matches!(words.first().map(String::as_str), Some("no" | "disable")) {
        return false;
    }
    words.iter().any(|w| {
        matches!(
            w.as_str(),
            "draft" | "drafts" | "drafter" | "spec" | "speculative" | "speculation" | "specprefill"
        ) || matches!(w.as_str(), "mtp" | "eagle" | "medusa")
    })
}

/// Splits at dashes, underscores, dots and the humps of camel case; lower case.
fn words(name: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    for c in name.chars() {
        let hump = c.is_uppercase() && word.chars().last().is_some_and(char::is_lowercase);
        if (hump || !c.is_alphanumeric()) && !word.is_empty() {
            words.push(std::mem::take(&mut word).to_lowercase());
        }
        if c.is_alphanumeric() {
            word.push(c);
        }
    }
    if !word.is_empty() {
        words.push(word.to_lowercase());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::is_speculative;

    #[test]
    fn recognises_every_family_of_draft_flags() {
        for name in [
            "--enable-mtp",
            "--mtp-num-draft-tokens",
            "--mtp-optimistic",
            "--specprefill",
            "--specprefill-threshold",
            "--mllm-draft-model",
            "--default-mllm-draft",
            "--draft-model",
            "--model-draft",
            "--num-draft-tokens=4",
            "--speculative-config",
            "--num-speculative-tokens",
            "--spec-type",
            "-md",
            "draftModel",
            "num_draft_tokens",
            "specprefillKeepPct",
        ] {
            assert!(is_speculative(name), "{name}");
        }
    }

    #[test]
    fn leaves_other_flags_alone() {
        for name in [
            "--model",
            "-m",
            "--max-tokens",
            "--port",
            "--inspect",
            "--no-draft-model",
            "special",
            "--cd",
        ] {
            assert!(!is_speculative(name), "{name}");
        }
    }
}
