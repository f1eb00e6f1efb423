//! The keys that tokens are made and proven with, and the file that holds them.
//!
//! Invariant: a keyring file that is readable by others, malformed or empty is refused with a sentence that says what to do
//! (test `a_bad_file_is_refused_with_the_fix`).
//! Invariant: what was sealed for one purpose opens for no other (test `what_is_sealed_opens_only_for_its_purpose`).

use std::{
    fmt, fs,
    io::{ErrorKind, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

use super::ALPHABET;
use crate::{ambient, error::Result};

const HEADER: &str = "\
# Keyward keyring: one key a line, `kid state key`. Tokens are made with the primary key; retired keys go on proving the tokens that
# were made with them until their line is removed. Whoever holds this file can make tokens: keep it as you keep passwords, and keep a copy.
";

/// Which key of the keyring made a token: one base62 character.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Kid(u8);

impl Kid {
    /// From its character; nothing if that is not base62.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        byte.is_ascii_alphanumeric().then_some(Self(byte))
    }

    /// Its character.
    #[must_use]
    pub fn as_char(self) -> char {
        char::from(self.0)
    }

    /// The one after it, round in a circle.
    fn next(self) -> Self {
        let after = ALPHABET.iter().cycle().skip_while(|byte| **byte != self.0).nth(1);
        Self(after.copied().unwrap_or(b'0'))
    }
}

/// Whether new tokens are made with a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyState {
    /// They are.
    Primary,
    /// It only proves old ones.
    Retired,
}

/// Tells two keys apart without telling them: 8 bytes derived from the key, kept in the store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fingerprint([u8; 8]);

impl Fingerprint {
    /// The bytes that the store keeps.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

struct Key {
    kid: Kid,
    bytes: Zeroizing<[u8; 32]>,
}

/// The keys. The first is the primary one.
pub struct Keyring {
    primary: Key,
    retired: Vec<Key>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keyring({} keys)", 1 + self.retired.len())
    }
}

impl Keyring {
    /// A keyring of one new key.
    ///
    /// # Errors
    /// `Internal` if the operating system has no randomness.
    pub fn generate() -> Result<Self> {
        Ok(Self { primary: Key { kid: Kid(b'A'), bytes: Zeroizing::new(ambient::random()?) }, retired: Vec::new() })
    }

    /// Makes a new key the primary one; the old ones are retired.
    ///
    /// # Errors
    /// Says so if all 62 names of keys are taken.
    pub fn rotate(&mut self) -> std::result::Result<Kid, String> {
        let mut kid = self.primary.kid.next();
        while self.key(kid).is_some() {
            if kid == self.primary.kid {
                return Err("the keyring holds 62 keys: remove retired ones that no token needs any more".to_owned());
            }
            kid = kid.next();
        }
        let bytes = Zeroizing::new(ambient::random().map_err(|error| error.to_string())?);
        let old = std::mem::replace(&mut self.primary, Key { kid, bytes });
        self.retired.insert(0, old);
        Ok(kid)
    }

    pub(super) fn primary(&self) -> (Kid, &[u8; 32]) {
        (self.primary.kid, &self.primary.bytes)
    }

    pub(super) fn key(&self, kid: Kid) -> Option<&[u8; 32]> {
        self.keys().find(|key| key.kid == kid).map(|key| &*key.bytes)
    }

    fn keys(&self) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.primary).chain(&self.retired)
    }

    /// What the store remembers of each key.
    #[must_use]
    pub fn fingerprints(&self) -> Vec<(Kid, KeyState, Fingerprint)> {
        self.keys()
            .map(|key| {
                let state = if key.kid == self.primary.kid { KeyState::Primary } else { KeyState::Retired };
                let mut fingerprint = [0; 8];
                let derived = blake3::derive_key("keyward v1 key fingerprint", &*key.bytes);
                fingerprint.copy_from_slice(derived.split_at(8).0);
                (key.kid, state, Fingerprint(fingerprint))
            })
            .collect()
    }

    /// Encrypts and authenticates `plain` for one purpose, with the primary key. What `purpose` says is not in the result, but needed to open it.
    ///
    /// # Errors
    /// `Internal` if the operating system has no randomness.
    pub fn seal(&self, purpose: &[u8], plain: &[u8]) -> Result<Vec<u8>> {
        let nonce: [u8; NONCE_LEN] = ambient::random()?;
        let mut buffer = plain.to_vec();
        sealing_key(&self.primary.bytes)
            .and_then(|key| key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(purpose), &mut buffer))
            .map_err(|error| crate::error::Error::Internal(error.to_string().into()))?;
        Ok([&[self.primary.kid.0], nonce.as_slice(), &buffer].concat())
    }

    /// Opens what was sealed for this purpose with any of the keys; nothing if it was not.
    #[must_use]
    pub fn open(&self, purpose: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
        let (kid, rest) = sealed.split_first()?;
        let (nonce, ciphertext) = rest.split_at_checked(NONCE_LEN)?;
        let key = sealing_key(self.key(Kid::from_byte(*kid)?)?).ok()?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let mut buffer = ciphertext.to_vec();
        let plain = key.open_in_place(nonce, Aad::from(purpose), &mut buffer).ok()?;
        Some(plain.to_vec())
    }

    /// As [`Keyring::seal`], as text that fits into a URL.
    ///
    /// # Errors
    /// As [`Keyring::seal`].
    pub fn seal_text(&self, purpose: &[u8], plain: &str) -> Result<String> {
        Ok(URL_SAFE_NO_PAD.encode(self.seal(purpose, plain.as_bytes())?))
    }

    /// Opens what [`Keyring::seal_text`] sealed for this purpose; nothing if it was not.
    #[must_use]
    pub fn open_text(&self, purpose: &[u8], sealed: &str) -> Option<String> {
        String::from_utf8(self.open(purpose, &URL_SAFE_NO_PAD.decode(sealed).ok()?)?).ok()
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut primary = None;
        let mut retired = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, state) = parse_line(line).ok_or_else(|| {
                format!("line {number} is not `kid state key` (one character; primary or retired; 64 hexadecimal digits)")
            })?;
            if retired.iter().chain(&primary).any(|other: &Key| other.kid == key.kid) {
                return Err(format!("line {number} repeats the key `{}`", key.kid.as_char()));
            }
            match state {
                KeyState::Retired => retired.push(key),
                KeyState::Primary if primary.is_none() => primary = Some(key),
                KeyState::Primary => return Err(format!("line {number} is a second primary key; retire one")),
            }
        }
        let primary = primary.ok_or("it has no primary key")?;
        Ok(Self { primary, retired })
    }

    fn render(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(HEADER.to_owned());
        for key in self.keys() {
            let state = if key.kid == self.primary.kid { "primary" } else { "retired" };
            text.push(key.kid.as_char());
            text.push(' ');
            text.push_str(state);
            text.push(' ');
            for byte in *key.bytes {
                text.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
                text.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('0'));
            }
            text.push('\n');
        }
        text
    }

    /// Reads a keyring file; nothing if there is none.
    ///
    /// # Errors
    /// A sentence that names the file and says what to do: it is readable by others, unreadable for us, or malformed.
    pub fn load(path: &Path) -> std::result::Result<Option<Self>, String> {
        let shown = path.display();
        let metadata = match fs::metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| format!("the keyring {shown} cannot be read: {error}"))?,
        };
        if metadata.mode() & 0o077 != 0 {
            return Err(format!(
                "the keyring {shown} can be read or changed by other users (mode {:03o}): run `chmod 600 {shown}`, and if \
                 somebody may have read it, `keyward keyring rotate`",
                metadata.mode() & 0o777
            ));
        }
        let text = fs::read_to_string(path).map(Zeroizing::new);
        let text = text.map_err(|error| format!("the keyring {shown} cannot be read: {error}"))?;
        let keyring = Self::parse(&text)
            .map_err(|error| format!("the keyring {shown} is damaged: {error}. Put back the copy that you keep of it"))?;
        Ok(Some(keyring))
    }

    /// Writes the file anew, mode 0600, in one step: a crash leaves the old one or the new one.
    ///
    /// # Errors
    /// A sentence that names the file.
    pub fn save(&self, path: &Path) -> std::result::Result<(), String> {
        let new = path.with_extension("new");
        let write = || {
            // A file that a crash left behind is removed, so that ours has its mode from birth.
            match fs::remove_file(&new) {
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(self.render().as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, path)?;
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            fs::File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(|error: std::io::Error| format!("the keyring {} cannot be written: {error}", path.display()))
    }
}

fn sealing_key(key: &[u8; 32]) -> std::result::Result<LessSafeKey, ring::error::Unspecified> {
    let derived = Zeroizing::new(blake3::derive_key("keyward v1 sealing", key));
    UnboundKey::new(&CHACHA20_POLY1305, &*derived).map(LessSafeKey::new)
}

fn parse_line(line: &str) -> Option<(Key, KeyState)> {
    let mut words = line.split_whitespace();
    let (kid, state, hex) = (words.next()?, words.next()?, words.next()?);
    let kid = Kid::from_byte(*kid.as_bytes().first().filter(|_| kid.len() == 1)?)?;
    let state = match state {
        "primary" => KeyState::Primary,
        "retired" => KeyState::Retired,
        _ => return None,
    };
    let mut bytes = Zeroizing::new([0; 32]);
    for (byte, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    (words.next().is_none() && hex.len() == 64).then_some((Key { kid, bytes }, state))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn keyring() -> Keyring {
        Keyring::generate().expect("randomness")
    }

    #[test]
    fn a_rotated_keyring_proves_old_and_new_tokens() {
        let mut keyring = keyring();
        let prefix = "kw".parse().expect("a prefix");
        let old = keyring.issue(&prefix).expect("randomness");
        keyring.rotate().expect("61 names are free");
        let new = keyring.issue(&prefix).expect("randomness");
        let read = Keyring::parse(&keyring.render()).expect("our own text");
        for issued in [&old, &new] {
            assert_eq!(read.prove(issued.secret.reveal().as_bytes()), Some(issued.digest));
        }
        assert_ne!(old.secret.reveal().as_bytes()[3], new.secret.reveal().as_bytes()[3]);
        assert_eq!(read.fingerprints(), keyring.fingerprints());
    }

    #[test]
    fn a_full_keyring_is_not_rotated() {
        let mut keyring = keyring();
        for _ in 0..61 {
            keyring.rotate().expect("a name is free");
        }
        assert!(keyring.rotate().is_err());
    }

    #[test]
    fn a_bad_file_is_refused_with_the_fix() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("keyring");
        assert!(Keyring::load(&path).expect("none is fine").is_none());
        keyring().save(&path).expect("writable");
        assert!(Keyring::load(&path).expect("ours").is_some());
        let refusal = |text: &str| {
            fs::write(&path, text).expect("writable");
            Keyring::load(&path).expect_err("malformed")
        };
        let key = "0".repeat(64);
        assert!(refusal("").contains("no primary key"));
        assert!(refusal("A primary 00").contains("line 1"));
        assert!(refusal(&format!("A primary {key}\nB primary {key}")).contains("second primary"));
        assert!(refusal(&format!("A primary {key}\nA retired {key}")).contains("repeats"));
        assert!(refusal(&format!("A primary {key}g")).contains("line 1"));
        keyring().save(&path).expect("writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("ours");
        assert!(Keyring::load(&path).expect_err("readable by others").contains("chmod 600"));
    }

    #[test]
    fn what_is_sealed_opens_only_for_its_purpose() {
        let mut keyring = keyring();
        let sealed = keyring.seal(b"page", b"cursor").expect("randomness");
        keyring.rotate().expect("a name is free");
        assert_eq!(keyring.open(b"page", &sealed).as_deref(), Some(b"cursor".as_slice()));
        assert_eq!(keyring.open(b"replay", &sealed), None);
        for index in 0..sealed.len() {
            assert_eq!(keyring.open(b"page", &sealed[..index]), None);
            let mut forged = sealed.clone();
            forged[index] ^= 1;
            assert_eq!(keyring.open(b"page", &forged), None);
        }
    }
}
