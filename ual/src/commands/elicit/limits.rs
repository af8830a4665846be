//! When to ask again: what a server says about its limits, and what to do where it says nothing.

use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

use rand::Rng;
use ureq::http::HeaderMap;

/// Longest wait that is not the server's wish.
const LONGEST: Duration = Duration::from_secs(60);
/// Of a wait, by which requests are spread after it.
const SPREAD: f64 = 0.1;
/// Longer than anybody waits, and short enough to be added to a time.
const AGES: Duration = Duration::from_secs(1 << 32);
/// How long a sleeping thread may overlook that the program ends.
const NAP: Duration = Duration::from_millis(50);

/// Wait before repetition `repetition`, counted from 0: doubled each time, and between half of that and all, at random, so
/// that requests which failed together are not repeated together.
pub fn backoff(first: Duration, repetition: u32) -> Duration {
    let whole = first
        .saturating_mul(1 << repetition.min(16))
        .min(LONGEST.max(first));
    whole.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// Wait that the answer to a failed request asks for, if any.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    if let Some(milliseconds) = text("retry-after-ms").and_then(|text| text.parse().ok()) {
        return Duration::try_from_secs_f64(f64::max(milliseconds, 0.0) / 1e3).ok();
    }
    let seconds = |text: &str| Duration::try_from_secs_f64(text.parse().ok()?).ok();
    let until = |text: &str| {
        let date = httpdate::parse_http_date(text).ok()?;
        Some(date.duration_since(SystemTime::now()).unwrap_or_default()) // a date in the past: no wait
    };
    let after = text("retry-after").and_then(|text| seconds(text).or_else(|| until(text)));
    after.or_else(|| exhausted(headers))
}

/// Wait until a limit that is used up, of requests or of tokens, is reset: from the x-ratelimit headers.
pub fn exhausted(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: String| headers.get(name)?.to_str().ok().map(str::trim);
    ["requests", "tokens"]
        .into_iter()
        .filter(|what| text(format!("x-ratelimit-remaining-{what}")) == Some("0"))
        .filter_map(|what| duration(text(format!("x-ratelimit-reset-{what}"))?))
        .max()
}

/// Reads `1h2m`, `6m0s`, `1.5s`, `20ms`, or a number of seconds.
fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let unit = rest.find(|c: char| c != '.' && !c.is_ascii_digit())?;
        let (number, tail) = rest.split_at(unit);
        let end = tail
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let scale = match unit {
            "h" => 3600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            "us" | "µs" => 1e-6,
            "ns" => 1e-9,
            _ => return None,
        };
        seconds += number.parse::<f64>().ok()? * scale;
        rest = tail;
    }
    Duration::try_from_secs_f64(seconds).ok()
}

/// A time before which no request is sent. A server's limits hold for all requests, so all wait for the same one.
pub struct Gate(Mutex<Closed>);

#[derive(Clone, Copy)]
struct Closed {
    until: Instant,
    /// By how much later those that wait may pass: not all at the moment that the server named.
    spread: Duration,
}

impl Default for Gate {
    /// Open.
    fn default() -> Self {
        Self(Mutex::new(Closed {
            until: Instant::now(),
            spread: Duration::ZERO,
        }))
    }
}

impl Gate {
    /// Lets nothing pass for `wait` from now, or longer where that was said before.
    pub fn close(&self, wait: Duration) {
        let mut closed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let until = Instant::now() + wait.min(AGES);
        if until > closed.until {
            *closed = Closed {
                until,
                spread: wait.mul_f64(SPREAD),
            };
        }
    }

    fn closed(&self) -> Closed {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long the gate stays closed.
    pub fn left(&self) -> Duration {
        self.closed()
            .until
            .saturating_duration_since(Instant::now())
    }

    /// Waits until the gate is open, and by chance a little longer, or until `stop` says true.
    pub fn pass(&self, stop: impl Fn() -> bool) {
        let share = rand::rng().random_range(0.0..=1.0);
        let end = || {
            let Closed { until, spread } = self.closed();
            until + spread.mul_f64(share)
        };
        nap_until(end, stop);
    }
}

/// Sleeps for `wait`, or until `stop` says true.
pub fn sleep(wait: Duration, stop: impl Fn() -> bool) {
    let end = Instant::now() + wait;
    nap_until(|| end, stop);
}

/// Until `end`, which may move, or until `stop` says true.
fn nap_until(end: impl Fn() -> Instant, stop: impl Fn() -> bool) {
    while !stop() {
        let left = end().saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::sleep(left.min(NAP));
    }
}
