//! What no text may show: the key, and what an address holds of the kind.

use std::borrow::Cow;

use base64::{Engine, engine::general_purpose::STANDARD};
use percent_encoding::percent_decode_str;

/// Stands in a secret's place.
const MASK: &str = "***";
/// Secrets of fewer bytes are masked where they stand alone: they may be part of any word.
const LONG: usize = 8;
/// Parts of names of a query's fields whose values are secret.
const SECRET_FIELDS: [&str; 5] = ["key", "token", "secret", "password", "sig"];

/// Longest first, as one may contain another.
pub struct Secrets(Vec<String>);

impl Secrets {
    pub fn new(key: Option<&str>, url: &str) -> Self {
        let mut plain: Vec<String> = key.map(str::to_string).into_iter().collect();
        let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
        if let Some(user) = user(url) {
            // Without a colon it may be a token.
            let password = user.split_once(':').map_or(user, |(_, password)| password);
            plain.extend([password.to_string(), decoded(password)]);
            // As the header says it.
            let whole = if user.contains(':') {
                user.to_string()
            } else {
                format!("{user}:")
            };
            plain.extend([STANDARD.encode(decoded(&whole)), STANDARD.encode(&whole)]);
        }
        let query = url.split_once('?').map_or("", |(_, query)| query);
        for (name, value) in query.split('&').filter_map(|field| field.split_once('=')) {
            let name = name.to_lowercase();
            if SECRET_FIELDS.iter().any(|part| name.contains(part)) {
                plain.extend([value.to_string(), decoded(value)]);
            }
        }
        let mut all: Vec<String> = plain
            .iter()
            .flat_map(|secret| {
                let quoted = secret.replace('\\', "\\\\").replace('"', "\\\"");
                let slashes = quoted.replace('/', "\\/");
                [secret.clone(), quoted, slashes]
            })
            .filter(|secret| !secret.is_empty())
            .collect();
        all.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        all.dedup();
        Self(all)
    }

    /// The text with every secret masked. To be called before a text is cut.
    pub fn hide(&self, text: &str) -> String {
        let mut text = Cow::Borrowed(text);
        for secret in &self.0 {
            if text.contains(secret.as_str()) {
                text = replace(&text, secret).into();
            }
        }
        text.into_owned()
    }
}

fn replace(text: &str, secret: &str) -> String {
    let mut replaced = String::with_capacity(text.len());
    let mut from = 0;
    for (at, _) in text.match_indices(secret) {
        let end = at + secret.len();
        let word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        let alone = !word(text[..at].chars().next_back()) && !word(text[end..].chars().next());
        if secret.len() >= LONG || alone {
            replaced += &text[from..at];
            replaced += MASK;
            from = end;
        }
    }
    replaced + &text[from..]
}

/// What an address says before its host: `user:password`.
fn user(url: &str) -> Option<&str> {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    if let Some((user, _)) = authority.rsplit_once('@') {
        return Some(user);
    }
    // A password with a character that should have been escaped: what looks like a port is none.
    let (_, port) = authority.split_once(':')?;
    let broken = !port.bytes().all(|byte| byte.is_ascii_digit());
    rest.rsplit_once('@')
        .filter(|_| broken)
        .map(|(user, _)| user)
}
