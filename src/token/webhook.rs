//! The secret that a workspace's webhook calls are signed with, and their signature (Standard Webhooks 1.0).
//!
//! Invariant: a signature is what the reference libraries of Standard Webhooks make of the same call (test
//! `the_signature_is_that_of_the_reference`).
//! Invariant: the secret is never printed (test `a_webhook_secret_prints_as_an_ellipsis`).

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use ring::hmac;
use zeroize::Zeroizing;

use super::Secret;
use crate::{
    ambient::{self, Time},
    error::Result,
};

const SECRET_BYTES: usize = 32;
const SECRET_PREFIX: &str = "whsec_";

/// 32 random bytes that Keyward and the receiver of a workspace's webhook share. Prints as `…` and is overwritten when dropped.
#[derive(Clone)]
pub struct WebhookSecret(Zeroizing<[u8; SECRET_BYTES]>);

impl WebhookSecret {
    /// A new one.
    ///
    /// # Errors
    /// `Internal` if the operating system has no randomness.
    pub fn generate() -> Result<Self> {
        Ok(Self(Zeroizing::new(ambient::random()?)))
    }

    /// From its bytes; nothing if they are not 32.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(|bytes| Self(Zeroizing::new(bytes)))
    }

    /// Its bytes, which the store keeps sealed.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &*self.0
    }

    /// The text that receivers are given: `whsec_` and base64.
    #[must_use]
    pub fn text(&self) -> Secret {
        let encoded = Zeroizing::new(STANDARD.encode(*self.0));
        let mut text = String::with_capacity(SECRET_PREFIX.len() + encoded.len());
        text.push_str(SECRET_PREFIX);
        text.push_str(&encoded);
        Secret::from(text)
    }

    /// The signature of a call, as it stands in `webhook-signature`: over its id, its time in whole seconds, and its body.
    #[must_use]
    pub fn sign(&self, id: &str, time: Time, body: &[u8]) -> String {
        signature(&*self.0, id, time, body)
    }
}

impl fmt::Debug for WebhookSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WebhookSecret(…)")
    }
}

fn signature(secret: &[u8], id: &str, time: Time, body: &[u8]) -> String {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, secret));
    context.update(format!("{id}.{}.", time.seconds()).as_bytes());
    context.update(body);
    format!("v1,{}", STANDARD.encode(context.sign()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_the_reference() {
        let secret = STANDARD.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("base64");
        let time = Time::from_micros(1_614_265_330_999_999);
        let signed = signature(&secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", time, br#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn everything_that_is_signed_counts() {
        let secret = WebhookSecret::generate().expect("randomness");
        let time = Time::from_micros(1_800_000_000_000_000);
        let signed = secret.sign("msg_1", time, b"{}");
        assert_eq!(signed, secret.sign("msg_1", time, b"{}"));
        let other = WebhookSecret::generate().expect("randomness");
        assert_ne!(signed, other.sign("msg_1", time, b"{}"));
        assert_ne!(signed, secret.sign("msg_2", time, b"{}"));
        assert_ne!(signed, secret.sign("msg_1", time + std::time::Duration::from_secs(1), b"{}"));
        assert_ne!(signed, secret.sign("msg_1", time, b"{ }"));
    }

    #[test]
    fn bytes_lead_back_to_their_secret() {
        let secret = WebhookSecret::generate().expect("randomness");
        let again = WebhookSecret::from_bytes(secret.as_bytes()).expect("32 bytes");
        assert_eq!(again.text().reveal(), secret.text().reveal());
        let encoded = secret.text().reveal().strip_prefix("whsec_").map(|text| STANDARD.decode(text).expect("base64"));
        assert_eq!(encoded.as_deref(), Some(secret.as_bytes()));
        assert!(WebhookSecret::from_bytes(&[0; 31]).is_none() && WebhookSecret::from_bytes(&[0; 33]).is_none());
    }

    #[test]
    fn a_webhook_secret_prints_as_an_ellipsis() {
        let secret = WebhookSecret::from_bytes(&[7; 32]).expect("32 bytes");
        assert_eq!(format!("{secret:?} {:?}", secret.text()), "WebhookSecret(…) …");
    }
}
