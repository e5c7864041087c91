//! Did-you-mean.

/// The candidate nearest to `written`, if one is near enough to be what was meant: one edit in three letters, or a
/// difference of case and separators only.
#[must_use]
pub fn closest<'a>(written: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |s: &str| -> String {
        s.chars()
            .filter(|c| c.is_alphanumeric())
            .flat_map(char::to_lowercase)
            .collect()
    };
    let wanted = plain(written);
    // No name is so long; comparing would take its square.
    if wanted.len() > 100 {
        return None;
    }
    let mut best: Option<(usize, &str)> = None;
    for candidate in candidates {
        let other = plain(candidate);
        let distance = strsim::damerau_levenshtein(&wanted, &other);
        let longest = wanted.chars().count().max(other.chars().count());
        if distance * 3 <= longest && best.is_none_or(|(d, _)| distance < d) {
            best = Some((distance, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}
