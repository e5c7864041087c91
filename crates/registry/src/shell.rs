//! A command line to its arguments, without a shell: POSIX quoting, nothing else.

/// Drops lines that are comments (first character `#`) and joins lines that end in a backslash.
pub(crate) fn strip_comments(cmd: &str) -> String {
    let kept: Vec<&str> = cmd
        .lines()
        .filter(|line| !line.trim_start().starts_with('#'))
        .collect();
    kept.join("\n").replace("\\\r\n", " ").replace("\\\n", " ")
}

/// Splits at blanks. Single quotes keep everything, double quotes all but `\"`, `\\`, `\$`, `` \` `` and an escaped
/// line end; a backslash outside quotes keeps the next character.
///
/// # Errors
/// A quote that is not closed, or a backslash at the very end.
pub(crate) fn split(cmd: &str) -> Result<Vec<String>, &'static str> {
    let mut argv = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = cmd.chars();
    while let Some(c) = chars.next() {
        match c {
            c if c.is_whitespace() => argv.extend(word.take()),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('\'') => break,
                        Some(c) => word.push(c),
                        None => return Err("a single quote is not closed"),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match chars.next() {
                        Some('"') => break,
                        Some('\\') => match chars.next() {
                            Some('\n') => {}
                            Some(c @ ('"' | '\\' | '$' | '`')) => word.push(c),
                            Some(c) => word.extend(['\\', c]),
                            None => return Err("a double quote is not closed"),
                        },
                        Some(c) => word.push(c),
                        None => return Err("a double quote is not closed"),
                    }
                }
            }
            '\\' => match chars.next() {
                Some('\n') => {}
                Some(c) => word.get_or_insert_default().push(c),
                None => return Err("a backslash at the end keeps nothing"),
            },
            c => word.get_or_insert_default().push(c),
        }
    }
    argv.extend(word);
    Ok(argv)
}

/// Quotes an argument where [`split`] needs it.
pub(crate) fn quote(arg: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "-_=+./:,@%^~{}$[]".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        return arg.to_owned();
    }
    format!("'{}'", arg.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::{quote, split, strip_comments};
    use proptest::prelude::*;

    #[test]
    fn quoting() {
        let ok = |s: &str| split(s).unwrap();
        assert_eq!(ok("a  b\tc\nd"), ["a", "b", "c", "d"]);
        assert_eq!(
            ok(r#"--x '{"a": 1}' "b \"c\" \d $e""#),
            ["--x", r#"{"a": 1}"#, r#"b "c" \d $e"#]
        );
        assert_eq!(ok(r"a\ b '' c''d"), ["a b", "", "cd"]);
        assert_eq!(ok("a # b"), ["a", "#", "b"]);
        assert_eq!(ok("  "), Vec::<String>::new());
        assert!(split("a 'b").is_err() && split("a \"b").is_err() && split("a\\").is_err());
    }

    #[test]
    fn comments_and_continuations() {
        let cmd = "server\n  # not this\n  --port 1 \\\n  --x y\n# nor this\n--z '#1'";
        assert_eq!(
            split(&strip_comments(cmd)).unwrap(),
            ["server", "--port", "1", "--x", "y", "--z", "#1"]
        );
    }

    proptest! {
        #[test]
        fn quoted_arguments_come_back(argv in prop::collection::vec(any::<String>(), 0..6)) {
            let line: Vec<String> = argv.iter().map(|a| quote(a)).collect();
            prop_assert_eq!(split(&line.join(" ")).unwrap(), argv);
        }

        #[test]
        fn nothing_panics(cmd in any::<String>()) {
            let _ = split(&strip_comments(&cmd));
        }
    }
}
