//! The two readings of a path that a gateway received, or none if servers are known to differ on it whatever the table.
//!
//! The strict reading is that of RFC 3986, section 6.2.2: escapes of unreserved characters decoded, letter case kept. The loose one has
//! every escape decoded, letters folded, blanks and trailing dots cut. What some servers split, merge, cut off or decode twice is not
//! read: encoded delimiters, dot segments, empty segments, path parameters, fragments, broken escapes and broken UTF-8.
//!
//! Invariant: no segment of either reading is empty, or holds a delimiter, a control or a percent sign
//! (test `what_servers_read_in_different_ways_is_not_read`).

const PATH_BYTES_MAX: usize = 8_192;
/// Far more than any server has use for, and few enough to be read in microseconds.
const PATH_SEGMENTS_MAX: usize = 256;

/// A segment of a path, in both readings.
pub(super) struct Segment {
    /// With every escape decoded.
    pub(super) decoded: String,
    /// Whether that is the strict reading: no character but unreserved ones was escaped.
    pub(super) is_normal: bool,
    /// The loose reading.
    pub(super) loose: String,
}

/// The segments of a path; nothing if servers read it in different ways whatever the table.
pub(super) fn read_path(path: &str) -> Option<Vec<Segment>> {
    if path.len() > PATH_BYTES_MAX {
        return None;
    }
    let path = path.split('?').next()?;
    match path.strip_prefix('/')? {
        "" => Some(Vec::new()),
        path if !path.bytes().all(|byte| byte.is_ascii_graphic()) || path.split('/').nth(PATH_SEGMENTS_MAX).is_some() => None,
        path => path.split('/').map(Segment::read).collect(),
    }
}

impl Segment {
    fn read(raw: &str) -> Option<Self> {
        let (decoded, is_normal) = decode(raw)?;
        // Escaped or not: these split a path on some server, or begin something that is cut off, or are decoded once more.
        if decoded.chars().any(|char| char.is_control() || matches!(char, '/' | '\\' | '%' | ';' | '?' | '#')) {
            return None;
        }
        let loose = fold(decoded.trim_start().trim_end_matches(|char: char| char.is_whitespace() || char == '.'));
        // Nothing is left of an empty one, a dot segment, or what Windows takes for one.
        (!loose.is_empty()).then_some(Self { decoded, is_normal, loose })
    }
}

/// Decodes every escape, and tells whether all of them were of unreserved characters. Nothing: a broken escape, or no UTF-8.
fn decode(raw: &str) -> Option<(String, bool)> {
    if !raw.contains('%') {
        return Some((raw.to_owned(), true));
    }
    let mut is_normal = true;
    let mut decoded = Vec::with_capacity(raw.len());
    let mut bytes = raw.bytes();
    while let Some(mut byte) = bytes.next() {
        if byte == b'%' {
            byte = hex_digit(bytes.next()?)? << 4 | hex_digit(bytes.next()?)?;
            is_normal &= byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
        }
        decoded.push(byte);
    }
    Some((String::from_utf8(decoded).ok()?, is_normal))
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| digit.try_into().ok())
}

/// Letters folded as some servers do: U+212A is a `k`, U+017F an `s`, U+0130 an `i` to those that compare by Unicode.
pub(super) fn fold(text: &str) -> String {
    if text.is_ascii() {
        return text.to_ascii_lowercase();
    }
    // The lower case of U+0130 is an `i` with a combining dot, or without on some servers.
    text.chars().flat_map(char::to_uppercase).flat_map(char::to_lowercase).filter(|char| *char != '\u{307}').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_read(path: &str) -> bool {
        read_path(path).is_some()
    }

    #[test]
    fn what_servers_read_in_different_ways_is_not_read() {
        for path in ["/a%20b", "/%C3%A9%F0%9F%98%80", "/%E2%82%AC.x", "/a%3Ab+c%7e", "/.well-known/a", "/", "/?", "/a?/../%", "/a|{b}[c]"] {
            assert!(is_read(path), "{path}");
        }
        let splits = "a * //a /a//b /a/ // /a;b /a%3Bb /a#b /a%23 /a%3f /a\\b /a%5cb /a%2Fb http://a/b ?/a";
        let dots = "/./a /a/.. /%2e%2E/a /.%20./a /a/%2e /a/.%2e/b /... /%20 /%C2%A0 /.%20";
        let escapes = "/a%25b /%252e /% /%4 /%4g /%u0041 /%+1 /%00 /%1f /%7f /a%C2%85 /%C0%AF /%FF /%ED%A0%80 /\u{e9}";
        for path in
            [splits, dots, escapes].into_iter().flat_map(|paths| paths.split(' ')).chain(["", "/a b", "/a\tb", "/a\r\n", "/a\0", "/\x7f"])
        {
            assert!(!is_read(path), "{path}");
        }
    }

    #[test]
    fn a_path_has_at_most_8192_bytes_and_256_segments() {
        assert!(is_read(&format!("/{}", "a".repeat(8191))) && is_read(&"/a".repeat(256)) && !is_read(&"/a".repeat(257)));
        assert!(!is_read(&format!("/{}", "a".repeat(8192))) && !is_read(&format!("/?{}", "a".repeat(8191))));
    }

    #[test]
    fn the_strict_reading_keeps_what_the_loose_one_folds() {
        let [plain, reserved, folded] =
            read_path("/%41b/a%3Ab/%20%C5%BFi%E2%84%AA%C4%B0.%20").and_then(|path| path.try_into().ok()).expect("three");
        assert_eq!((plain.decoded.as_str(), plain.is_normal, plain.loose.as_str()), ("Ab", true, "ab"));
        assert_eq!((reserved.is_normal, reserved.loose.as_str()), (false, "a:b"));
        assert_eq!((folded.is_normal, folded.loose.as_str()), (false, "siki"));
    }
}
