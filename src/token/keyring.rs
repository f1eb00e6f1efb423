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
# were made with them until their line is removed; the next key is known already, and makes tokens once it is promoted. Whoever holds
# this file can make tokens: keep it as you keep passwords, and keep a copy.
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
    /// Not yet: every server has to know it first.
    Next,
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

/// The keys.
pub struct Keyring {
    primary: Key,
    next: Option<Key>,
    retired: Vec<Key>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Keyring({} keys)", self.keys().count())
    }
}

impl Keyring {
    /// A keyring of one new key.
    ///
    /// # Errors
    /// `Internal` if the operating system has no randomness.
    pub fn generate() -> Result<Self> {
        Ok(Self { primary: Key { kid: Kid(b'A'), bytes: Zeroizing::new(ambient::random()?) }, next: None, retired: Vec::new() })
    }

    /// Adds a key that is known and makes no tokens until it is promoted.
    ///
    /// # Errors
    /// Says so if there is such a key already, or all 62 names of keys are taken.
    pub fn add(&mut self) -> std::result::Result<Kid, String> {
        if let Some(next) = &self.next {
            return Err(format!("key {} was added already and waits to be promoted", next.kid.as_char()));
        }
        let mut kid = self.primary.kid.next();
        while self.key(kid).is_some() {
            if kid == self.primary.kid {
                return Err("the keyring holds 62 keys: remove retired ones that no token needs any more".to_owned());
            }
            kid = kid.next();
        }
        let bytes = Zeroizing::new(ambient::random().map_err(|error| error.to_string())?);
        self.next = Some(Key { kid, bytes });
        Ok(kid)
    }

    /// Makes the key that was added the primary one; the one before it is retired.
    ///
    /// # Errors
    /// Says so if none was added.
    pub fn promote(&mut self) -> std::result::Result<Kid, String> {
        let next = self.next.take().ok_or("there is no key to promote: add one first")?;
        let kid = next.kid;
        let old = std::mem::replace(&mut self.primary, next);
        self.retired.insert(0, old);
        Ok(kid)
    }

    pub(super) fn primary(&self) -> (Kid, &[u8; 32]) {
        (self.primary.kid, &self.primary.bytes)
    }

    pub(super) fn key(&self, kid: Kid) -> Option<&[u8; 32]> {
        self.keys().find(|key| key.kid == kid).map(|key| &*key.bytes)
    }

    fn state(&self, kid: Kid) -> KeyState {
        match &self.next {
            _ if kid == self.primary.kid => KeyState::Primary,
            Some(next) if kid == next.kid => KeyState::Next,
            _ => KeyState::Retired,
        }
    }

    fn keys(&self) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.primary).chain(&self.next).chain(&self.retired)
    }

    /// What the store remembers of each key.
    #[must_use]
    pub fn fingerprints(&self) -> Vec<(Kid, KeyState, Fingerprint)> {
        self.keys()
            .map(|key| {
                let mut fingerprint = [0; 8];
                let derived = blake3::derive_key("keyward v1 key fingerprint", &*key.bytes);
                fingerprint.copy_from_slice(derived.split_at(8).0);
                (key.kid, self.state(key.kid), Fingerprint(fingerprint))
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
        let (mut primary, mut next, mut retired) = (None, None, Vec::new());
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            if line.trim().is_empty() || line.starts_with('#') {
                continue;
            }
            let (key, state) = parse_line(line).ok_or_else(|| {
                format!("line {number} is not `kid state key` (one character; primary, next or retired; 64 hexadecimal digits)")
            })?;
            if retired.iter().chain(&primary).chain(&next).any(|other: &Key| other.kid == key.kid) {
                return Err(format!("line {number} repeats the key `{}`", key.kid.as_char()));
            }
            match state {
                KeyState::Retired => retired.push(key),
                KeyState::Primary if primary.is_none() => primary = Some(key),
                KeyState::Primary => return Err(format!("line {number} is a second primary key; retire one")),
                KeyState::Next if next.is_none() => next = Some(key),
                KeyState::Next => return Err(format!("line {number} is a second next key; remove one")),
            }
        }
        let primary = primary.ok_or("it has no primary key")?;
        Ok(Self { primary, next, retired })
    }

    fn render(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(HEADER.to_owned());
        for key in self.keys() {
            let state = match self.state(key.kid) {
                KeyState::Primary => "primary",
                KeyState::Next => "next",
                KeyState::Retired => "retired",
            };
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
        self.place(path, |new| fs::rename(new, path))
    }

    /// As [`Keyring::save`], unless there is a file by now, which stays: of several servers that start in one folder, one makes the keyring. Whether it is this one.
    ///
    /// # Errors
    /// As [`Keyring::save`].
    pub fn save_first(&self, path: &Path) -> std::result::Result<bool, String> {
        let mut is_first = true;
        self.place(path, |new| {
            match fs::hard_link(new, path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => is_first = false,
                other => other?,
            }
            fs::remove_file(new)
        })?;
        Ok(is_first)
    }

    /// Writes a file of nobody else's, and has it put into its place.
    fn place(&self, path: &Path, put: impl FnOnce(&Path) -> std::io::Result<()>) -> std::result::Result<(), String> {
        let write = || {
            let suffix: [u8; 8] = ambient::random().map_err(std::io::Error::other)?;
            let new = path.with_extension(format!("{:016x}.new", u64::from_le_bytes(suffix)));
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(self.render().as_bytes())?;
            file.sync_all()?;
            put(&new)?;
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
        "next" => KeyState::Next,
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

    fn rotate(keyring: &mut Keyring) -> std::result::Result<Kid, String> {
        keyring.add().and_then(|_| keyring.promote())
    }

    #[test]
    fn a_key_that_was_added_makes_no_tokens_until_it_is_promoted() {
        let mut keyring = keyring();
        let prefix = "kw".parse().expect("a prefix");
        assert!(keyring.promote().is_err(), "there is none");
        let next = keyring.add().expect("a name is free");
        assert!(keyring.add().is_err(), "one at a time");
        let mut ahead = Keyring::parse(&keyring.render()).expect("our own text");
        assert_eq!(ahead.fingerprints(), keyring.fingerprints());
        assert_ne!(keyring.primary().0, next);
        assert_eq!(ahead.promote(), Ok(next));
        let made = ahead.issue(&prefix).expect("randomness");
        assert_eq!(keyring.prove(made.secret.reveal().as_bytes()), Some(made.digest), "who does not know yet that it was promoted");
        let made = keyring.issue(&prefix).expect("randomness");
        assert_eq!(ahead.prove(made.secret.reveal().as_bytes()), Some(made.digest));
    }

    #[test]
    fn of_several_who_make_the_first_keyring_one_does() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("keyring");
        let saved: Vec<bool> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| keyring().save_first(&path).expect("writable"))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(saved.iter().filter(|is_first| **is_first).count(), 1);
        assert!(Keyring::load(&path).expect("whole").is_some());
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 1, "nothing is left behind");
    }

    #[test]
    fn a_rotated_keyring_proves_old_and_new_tokens() {
        let mut keyring = keyring();
        let prefix = "kw".parse().expect("a prefix");
        let old = keyring.issue(&prefix).expect("randomness");
        rotate(&mut keyring).expect("61 names are free");
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
            rotate(&mut keyring).expect("a name is free");
        }
        assert!(rotate(&mut keyring).is_err());
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
        assert!(refusal(&format!("A primary {key}\nA next {key}")).contains("repeats"));
        assert!(refusal(&format!("A primary {key}\nB next {key}\nC next {key}")).contains("second next"));
        assert!(refusal(&format!("A primary {key}g")).contains("line 1"));
        keyring().save(&path).expect("writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("ours");
        assert!(Keyring::load(&path).expect_err("readable by others").contains("chmod 600"));
    }

    #[test]
    fn what_is_sealed_opens_only_for_its_purpose() {
        let mut keyring = keyring();
        let sealed = keyring.seal(b"page", b"cursor").expect("randomness");
        rotate(&mut keyring).expect("a name is free");
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
