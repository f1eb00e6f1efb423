//! The text of a token: make, parse, prove, mask; ids; and the [`Keyring`] behind them.
//!
//! `prefix _ kid secret proof check`, for example `prod_` and 45 characters: one hash, keyed with `kid`'s key, over everything before the
//! proof gives both what the store keeps (24 bytes) and the proof that the token carries (8 bytes). So a token that was not made with
//! the key is refused by form alone, and neither a dump of the store nor write access to it makes a token.
//!
//! Invariant: only the canonical text is accepted (tests `neighbours_of_a_token_are_refused`, `invented_tokens_are_refused`).
//! Invariant: reading a token does not allocate; its text is never printed (test `secrets_print_as_an_ellipsis`).

mod keyring;
mod webhook;

use std::{
    fmt::{self, Write as _},
    hash::{Hash, Hasher},
    str::FromStr,
};

use zeroize::Zeroizing;

pub use keyring::{Fingerprint, KeyState, Keyring, Kid};
pub use webhook::WebhookSecret;

use crate::{
    ambient::{self, Time},
    error::Result,
};

/// Sorted as ASCII sorts, so that texts of the same length sort as their numbers.
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

const SECRET_BYTES: usize = 20;
const SECRET_CHARS: usize = 27;
const PROOF_CHARS: usize = 11;
const CHECK_CHARS: usize = 6;
const BODY_CHARS: usize = 1 + SECRET_CHARS + PROOF_CHARS + CHECK_CHARS;
const PREFIX_CHARS_MIN: usize = 2;
const PREFIX_CHARS_MAX: usize = 12;
const HINT_CHARS: usize = 8;

/// What the store keeps of a token, and what the cache looks it up by: 24 bytes of its keyed hash.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 24]);

impl Digest {
    /// From the bytes that the store keeps; nothing if they are not 24.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes that the store keeps.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 24] {
        &self.0
    }
}

impl Hash for Digest {
    /// The first 8 bytes as they are: they are a keyed hash already.
    fn hash<H: Hasher>(&self, state: &mut H) {
        let mut front = [0; 8];
        front.copy_from_slice(self.0.split_at(8).0);
        state.write_u64(u64::from_le_bytes(front));
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Digest(…)")
    }
}

/// Whether two secrets are the same, in a time that depends on their lengths only.
#[must_use]
pub fn is_same_secret(one: &[u8], other: &[u8]) -> bool {
    constant_time_eq::constant_time_eq(one, other)
}

/// A token's text on its way to its holder. Prints as `…` and is overwritten when dropped.
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// The text, for the one answer that may carry it.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// The first 8 characters, by which people recognise it.
    #[must_use]
    pub fn hint(&self) -> String {
        self.0.chars().take(HINT_CHARS).collect()
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(Zeroizing::new(text))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// The brand at the front of a token: `[a-z][a-z0-9]{1,11}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    /// The text, without the underscore.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Prefix {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        if is_prefix(text.as_bytes()) {
            Ok(Self(text.to_owned()))
        } else {
            Err("must be 2 to 12 lower-case letters and digits, starting with a letter")
        }
    }
}

fn is_prefix(bytes: &[u8]) -> bool {
    (PREFIX_CHARS_MIN..=PREFIX_CHARS_MAX).contains(&bytes.len())
        && bytes.first().is_some_and(u8::is_ascii_lowercase)
        && bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

/// A token that was just made.
#[derive(Debug)]
pub struct Issued {
    /// For its holder.
    pub secret: Secret,
    /// For the store.
    pub digest: Digest,
}

impl Keyring {
    /// Makes a token with the primary key.
    ///
    /// # Errors
    /// `Internal` if the operating system has no randomness.
    pub fn issue(&self, prefix: &Prefix) -> Result<Issued> {
        let random = Zeroizing::new(ambient::random::<SECRET_BYTES>()?);
        let (kid, key) = self.primary();
        let mut text = String::with_capacity(PREFIX_CHARS_MAX + 1 + BODY_CHARS);
        text.push_str(prefix.as_str());
        text.push('_');
        text.push(kid.as_char());
        push_base62(&mut text, &base62_wide::<SECRET_CHARS>(*random));
        let (digest, proof) = split(blake3::keyed_hash(key, text.as_bytes()));
        push_base62(&mut text, &base62::<PROOF_CHARS>(proof));
        let check = crc32fast::hash(text.as_bytes());
        push_base62(&mut text, &base62::<CHECK_CHARS>(u64::from(check)));
        Ok(Issued { secret: Secret::from(text), digest })
    }

    /// The digest of a token that was made with one of our keys; nothing for any other text.
    #[must_use]
    pub fn prove(&self, text: &[u8]) -> Option<Digest> {
        let split_at = |index: usize| text.split_at_checked(index);
        let (prefix, rest) = split_at(text.len().checked_sub(BODY_CHARS + 1)?)?;
        let (separator, body) = rest.split_first()?;
        if *separator != b'_' || !is_prefix(prefix) || !body.iter().all(u8::is_ascii_alphanumeric) {
            return None;
        }
        let (signed, check) = split_at(text.len() - CHECK_CHARS)?;
        if number_of(check)? != u64::from(crc32fast::hash(signed)) {
            return None;
        }
        let (hashed, proof) = signed.split_at_checked(signed.len() - PROOF_CHARS)?;
        let key = self.key(Kid::from_byte(*body.first()?)?)?;
        let (digest, expected) = split(blake3::keyed_hash(key, hashed));
        // Two numbers compare in one step, whatever they are.
        (number_of(proof)? == expected).then_some(digest)
    }
}

/// The store's part and the token's part of the hash.
fn split(hash: blake3::Hash) -> (Digest, u64) {
    let mut digest = [0; 24];
    let mut proof = [0; 8];
    let (front, back) = hash.as_bytes().split_at(24);
    digest.copy_from_slice(front);
    proof.copy_from_slice(back);
    (Digest(digest), u64::from_be_bytes(proof))
}

/// The last `N` base62 digits of a number, most significant first.
fn base62<const N: usize>(mut number: u64) -> [u8; N] {
    let mut digits = [b'0'; N];
    for digit in digits.iter_mut().rev() {
        *digit = digit_of(number % 62);
        number /= 62;
    }
    digits
}

/// The last `N` base62 digits of a big-endian number of any width.
fn base62_wide<const N: usize>(mut number: impl AsMut<[u8]>) -> [u8; N] {
    let mut digits = [b'0'; N];
    for digit in digits.iter_mut().rev() {
        let mut remainder = 0_u64;
        for byte in number.as_mut() {
            let dividend = remainder << 8 | u64::from(*byte);
            *byte = u8::try_from(dividend / 62).unwrap_or(u8::MAX);
            remainder = dividend % 62;
        }
        *digit = digit_of(remainder);
    }
    digits
}

/// The values of base62 digits by their bytes; [`NO_DIGIT`] for all others.
#[expect(clippy::indexing_slicing, reason = "done by the compiler, which would say so")]
const VALUES: [u8; 256] = {
    let mut values = [NO_DIGIT; 256];
    let mut value: u8 = 0;
    while value < 62 {
        values[ALPHABET[value as usize] as usize] = value;
        value += 1;
    }
    values
};
const NO_DIGIT: u8 = u8::MAX;

/// The number that base62 digits are; nothing if one of them is none, or the number has more than 64 bits: no number has two texts.
fn number_of(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0_u64, |number, digit| {
        let value = *VALUES.get(usize::from(*digit))?;
        (value != NO_DIGIT).then_some(())?;
        number.checked_mul(62)?.checked_add(u64::from(value))
    })
}

fn digit_of(value: u64) -> u8 {
    usize::try_from(value).ok().and_then(|index| ALPHABET.get(index)).copied().unwrap_or(b'0')
}

fn push_base62(text: &mut String, digits: &[u8]) {
    text.extend(digits.iter().map(|digit| char::from(*digit)));
}

/// An id that sorts by the time at which it was made: 48 bits of milliseconds, 80 random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(u128);

const ID_PREFIX: &str = "tok_";
const ID_CHARS: usize = 22;

impl TokenId {
    /// A new one.
    ///
    /// # Errors
    /// `Internal` if the operating system has no randomness.
    pub fn new(now: Time) -> Result<Self> {
        unique(now).map(Self)
    }

    /// When it was made, to the millisecond.
    #[must_use]
    pub fn create_time(self) -> Time {
        Time::from_micros(i64::try_from((self.0 >> 80) * 1_000).unwrap_or(i64::MAX))
    }

    /// Which of `count` places it falls into, 65,536 at most, by its random part.
    #[must_use]
    pub fn shard(self, count: usize) -> usize {
        let [.., high, low] = self.0.to_be_bytes();
        usize::from(u16::from_be_bytes([high, low])) % count
    }

    /// As 16 bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }

    /// From what [`TokenId::to_bytes`] gave.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_le_bytes(bytes))
    }

    /// From its text; nothing if that is no id.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(ID_PREFIX)?;
        let number = digits.bytes().try_fold(0_u128, |number, digit| {
            let value = VALUES.get(usize::from(digit)).filter(|value| **value != NO_DIGIT)?;
            number.checked_mul(62)?.checked_add(u128::from(*value))
        })?;
        (digits.len() == ID_CHARS).then_some(Self(number))
    }
}

impl fmt::Display for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ID_PREFIX)?;
        base62_wide::<ID_CHARS>(self.0.to_be_bytes()).iter().try_for_each(|digit| f.write_char(char::from(*digit)))
    }
}

impl fmt::Debug for TokenId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A new id for an audit event: `evt_` and 22 characters that sort by time.
///
/// # Errors
/// `Internal` if the operating system has no randomness.
pub fn event_id(now: Time) -> Result<String> {
    sorted_id("evt_", now)
}

/// A new id for a notice, such as that of an audit event: `ntc_`.
///
/// # Errors
/// As [`event_id`].
pub fn notice_id(now: Time) -> Result<String> {
    sorted_id("ntc_", now)
}

/// A new id for a fault, such as that of an audit event: `flt_`.
///
/// # Errors
/// As [`event_id`].
pub fn fault_id(now: Time) -> Result<String> {
    sorted_id("flt_", now)
}

fn sorted_id(kind: &str, now: Time) -> Result<String> {
    let mut text = kind.to_owned();
    push_base62(&mut text, &base62_wide::<ID_CHARS>(unique(now)?.to_be_bytes()));
    Ok(text)
}

/// The least id of an audit event of this instant or later.
#[must_use]
pub fn event_floor(time: Time) -> String {
    let mut text = String::from("evt_");
    push_base62(&mut text, &base62_wide::<ID_CHARS>((u128::from(time.millis()) << 80).to_be_bytes()));
    text
}

fn unique(now: Time) -> Result<u128> {
    let mut bytes = [0; 16];
    let (_, tail) = bytes.split_at_mut(6);
    tail.copy_from_slice(&ambient::random::<10>()?);
    Ok(u128::from(now.millis()) << 80 | u128::from_be_bytes(bytes))
}

/// Tells two requests apart: a hash over parts that cannot run into each other.
#[must_use]
pub fn fingerprint(parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keyring() -> Keyring {
        Keyring::generate().expect("randomness")
    }

    fn prefix() -> impl Strategy<Value = Prefix> {
        "[a-z][a-z0-9]{1,11}".prop_map(|text| text.parse().expect("the pattern is the rule"))
    }

    /// The text with a proof and a check of its own, made with `key`.
    fn forge(key: &[u8; 32], hashed: &str) -> String {
        let (_, proof) = split(blake3::keyed_hash(key, hashed.as_bytes()));
        let mut text = hashed.to_owned();
        push_base62(&mut text, &base62::<PROOF_CHARS>(proof));
        let check = crc32fast::hash(text.as_bytes());
        push_base62(&mut text, &base62::<CHECK_CHARS>(u64::from(check)));
        text
    }

    fn with_check(signed: &[u8]) -> Vec<u8> {
        let mut text = signed.to_vec();
        text.extend(base62::<CHECK_CHARS>(u64::from(crc32fast::hash(signed))));
        text
    }

    proptest! {
        #[test]
        fn a_token_proves_itself_with_its_digest(prefix in prefix()) {
            let keyring = keyring();
            let issued = keyring.issue(&prefix).expect("randomness");
            prop_assert_eq!(keyring.prove(issued.secret.reveal().as_bytes()), Some(issued.digest));
            prop_assert_eq!(issued.secret.reveal().len(), prefix.as_str().len() + 46);
            prop_assert!(issued.secret.reveal().starts_with(&issued.secret.hint()));
            prop_assert_eq!(issued.secret.hint().len(), 8);
        }

        #[test]
        fn any_other_text_is_refused(text in proptest::collection::vec(any::<u8>(), 0..80)) {
            prop_assert_eq!(keyring().prove(&text), None);
        }

        #[test]
        fn ids_round_trip_and_sort_by_time(earlier in 0..i64::MAX / 4, later in 1..i64::MAX / 4) {
            let first = TokenId::new(Time::from_micros(earlier % (1 << 56))).expect("randomness");
            prop_assert_eq!(TokenId::parse(&first.to_string()), Some(first));
            let second = TokenId::new(Time::from_micros(earlier % (1 << 56)) + std::time::Duration::from_micros(u64::try_from(later % (1 << 56)).unwrap_or(0) + 1000)).expect("randomness");
            prop_assert!(first.to_string() < second.to_string());
        }
    }

    #[test]
    fn neighbours_of_a_token_are_refused() {
        let keyring = keyring();
        for prefix in ["kw", "prod", "abcdefghijkl"] {
            let issued = keyring.issue(&prefix.parse().expect("a prefix")).expect("randomness");
            let text = issued.secret.reveal().as_bytes();
            let refused = |neighbour: &[u8]| assert!(neighbour == text || keyring.prove(neighbour).is_none());
            for index in 0..=text.len() {
                refused(&text[..index]);
                refused(&text[index..]);
                for byte in 0..=u8::MAX {
                    let mut inserted = text.to_vec();
                    inserted.insert(index, byte);
                    refused(&inserted);
                    if index < text.len() {
                        let mut replaced = text.to_vec();
                        replaced[index] = byte;
                        refused(&replaced);
                    }
                }
                if index < text.len() {
                    let mut removed = text.to_vec();
                    removed.remove(index);
                    refused(&removed);
                    // A neighbour whose check is right: only the proof stands in the way.
                    let signed = &text[..text.len() - CHECK_CHARS];
                    for byte in ALPHABET.iter().filter(|_| index < signed.len()) {
                        let mut replaced = signed.to_vec();
                        replaced[index] = *byte;
                        refused(&with_check(&replaced));
                    }
                }
                if index + 1 < text.len() {
                    let mut swapped = text.to_vec();
                    swapped.swap(index, index + 1);
                    refused(&swapped);
                }
            }
            refused(text.to_ascii_uppercase().as_slice());
            refused(text.to_ascii_lowercase().as_slice());
            refused(&[text, b"\n"].concat());
            refused(&[b" ".as_slice(), text].concat());
            refused(&[text, text].concat());
        }
    }

    #[test]
    fn invented_tokens_are_refused() {
        let keyring = keyring();
        let foreign = self::keyring();
        let (kid, key) = foreign.primary();
        let forged = forge(key, &format!("kw_{}{}", kid.as_char(), "A".repeat(SECRET_CHARS)));
        assert!(foreign.prove(forged.as_bytes()).is_some(), "the forgery is well made");
        assert!(keyring.prove(forged.as_bytes()).is_none());
        // Unknown key, prefix that is none.
        let (_, ours) = keyring.primary();
        assert!(keyring.prove(forge(ours, &format!("kw_z{}", "A".repeat(SECRET_CHARS))).as_bytes()).is_none());
        assert!(keyring.prove(forge(ours, &format!("k_{}{}", kid.as_char(), "A".repeat(SECRET_CHARS))).as_bytes()).is_none());
        assert!(keyring.prove(forge(ours, &format!("Kw_{}{}", kid.as_char(), "A".repeat(SECRET_CHARS))).as_bytes()).is_none());
        assert!(keyring.prove(forge(ours, &format!("kw_{}{}", kid.as_char(), "A".repeat(SECRET_CHARS))).as_bytes()).is_some());
    }

    #[test]
    fn digits_are_those_of_the_number() {
        assert_eq!(&base62::<3>(61), b"00z");
        assert_eq!(&base62::<3>(62), b"010");
        assert_eq!(&base62_wide::<3>(62_u32.to_be_bytes()), b"010");
        assert_eq!(&base62_wide::<27>([0xff; 20])[..1], b"a", "160 bits fill 27 digits");
        assert_eq!(base62::<11>(u64::MAX), base62_wide::<11>(u64::MAX.to_be_bytes()));
    }

    #[test]
    fn secrets_print_as_an_ellipsis() {
        let issued = keyring().issue(&"kw".parse().expect("a prefix")).expect("randomness");
        assert_eq!(format!("{issued:?}"), "Issued { secret: …, digest: Digest(…) }");
        assert!(!format!("{:?}", keyring()).contains("key:"));
    }

    #[test]
    fn ids_of_another_form_are_none() {
        for text in [
            "",
            "tok_",
            "tok_0",
            "key_0000000000000000000000",
            "tok_00000000000000000000000",
            "tok_000000000000000000000-",
            "tok_zzzzzzzzzzzzzzzzzzzzzz",
        ] {
            assert_eq!(TokenId::parse(text), None, "{text}");
        }
    }
}
