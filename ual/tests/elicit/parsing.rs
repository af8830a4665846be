//! How answers and headers are read.

use std::time::{Duration, SystemTime};

use candle_ual::commands::elicit::{limits, prompt};
use ureq::http::HeaderMap;

#[test]
fn an_answer_is_a_number_in_its_last_line_and_nothing_else() {
    for (text, value) in [
        ("Uncertainty: 0", 0.0),
        ("Uncertainty: 100", 1.0),
        ("Uncertainty:37.5\n\n", 0.375),
        ("Experts agree.\n  Uncertainty: 20  \n", 0.2),
    ] {
        assert_eq!(prompt::parse(text), Some(value), "{text:?}");
    }
    for text in [
        "",
        "37",
        "Uncertainty:",
        "Uncertainty: N",
        "Uncertainty: 101",
        "Uncertainty: 100.01",
        "Uncertainty: -1",
        "Uncertainty: +1",
        "Uncertainty: 37%",
        "Uncertainty: 3 7",
        "Uncertainty: 1e1",
        "Uncertainty: NaN",
        "Uncertainty: 5.",
        "Uncertainty: .5",
        "Uncertainty: 10-20",
        "uncertainty: 5",
        "**Uncertainty: 5**",
        "Uncertainty: 5\nI hope this helps.",
        "The Uncertainty: 5",
        "Uncertainty: ５",
    ] {
        assert_eq!(prompt::parse(text), None, "{text:?}");
    }
}

#[test]
fn waits_are_read_as_servers_write_them() {
    let wait = |pairs: &[(&'static str, String)]| {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        limits::retry_after(&headers).map(|wait| wait.as_secs_f64())
    };
    assert_eq!(wait(&[]), None);
    assert_eq!(wait(&[("retry-after", "2.5".into())]), Some(2.5));
    assert_eq!(
        wait(&[
            ("retry-after", "20".into()),
            ("retry-after-ms", "150".into())
        ]),
        Some(0.15)
    );
    assert_eq!(wait(&[("retry-after", "soon".into())]), None);
    let reset = [
        ("retry-after", "soon".to_string()),
        ("x-ratelimit-remaining-tokens", "0".to_string()),
        ("x-ratelimit-reset-tokens", "3s".to_string()),
    ];
    assert_eq!(wait(&reset), Some(3.0));
    assert_eq!(wait(&[("retry-after", "-5".into())]), None);
    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(30));
    let until = wait(&[("retry-after", date)]).unwrap();
    assert!((28.0..=30.0).contains(&until), "{until}");
    assert_eq!(
        wait(&[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT".into())]),
        Some(0.0)
    );
    for (text, seconds) in [
        ("1s", Some(1.0)),
        ("6m0s", Some(360.0)),
        ("1h1m1.5s", Some(3661.5)),
        ("20ms", Some(0.02)),
        ("3", Some(3.0)),
        ("x", None),
        ("5y", None),
    ] {
        let reset = [
            ("x-ratelimit-remaining-tokens", "0".to_string()),
            ("x-ratelimit-reset-tokens", text.to_string()),
        ];
        assert_eq!(wait(&reset), seconds, "{text}");
    }
    let left = [
        ("x-ratelimit-remaining-tokens", "9".to_string()),
        ("x-ratelimit-reset-tokens", "1s".to_string()),
    ];
    assert_eq!(wait(&left), None);

    let first = Duration::from_secs(1);
    for repetition in 0..40 {
        let longest = 2f64.powi(repetition).min(60.0);
        let wait = limits::backoff(first, repetition as u32).as_secs_f64();
        assert!(
            (longest / 2.0 - 1e-9..=longest + 1e-9).contains(&wait),
            "{repetition}: {wait}"
        );
    }
}
