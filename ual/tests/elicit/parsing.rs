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
        ("Uncertainty: 20\nUncertainty: 30", 0.3),
    ] {
        assert_eq!(prompt::parse(text), Some(value), "{text:?}");
    }
    for text in [
        "",
        "37",
        "Uncertainty",
        "Uncertainty:",
        "Uncertainty: N",
        "Uncertainty: 101",
        "Uncertainty: 150",
        "Uncertainty: 150%",
        "Uncertainty: 100.01",
        "Uncertainty: -1",
        "Uncertainty: −5",
        "Uncertainty: –5",
        "Uncertainty: +1",
        "Uncertainty: ~5",
        "Uncertainty: <5",
        "Uncertainty: 3 7",
        "Uncertainty: 1e1",
        "Uncertainty: 1e2",
        "Uncertainty: NaN",
        "Uncertainty: .5",
        "Uncertainty: 5..",
        "Uncertainty: 5. 6",
        "Uncertainty: 5,5",
        "Uncertainty: 1,000",
        "Uncertainty: 5_0",
        "Uncertainty: 5*3",
        "Uncertainty: 5**2",
        "Uncertainty: 5 **10**",
        "Uncertainty: 10-20",
        "Uncertainty: 10 - 20",
        "Uncertainty: 10–20",
        "Uncertainty: 10..20",
        "Uncertainty: 10 to 20",
        "Uncertainty: 10%-20%",
        "Uncertainty: 8/10",
        "Uncertainty: 85/1000",
        "Uncertainty: 85/100/100",
        "Uncertainty: 85%/100",
        "Uncertainty: 85%%",
        "Uncertainty: 85 per cent",
        "Uncertainty: five",
        "Uncertainty: twenty-five",
        "Uncertainty: ٥",
        "Uncertainty: 五",
        "Uncertainty: ½",
        "Uncertainty: 5²",
        "Uncertainty: 5 reasons, so score: 5",
        "Uncertainty has 5 reasons. score: 5",
        "Uncertainty: 5\nI hope this helps.",
        "Uncertainty: 5<|im_start|>",
        "The Uncertainty: 5",
        "Certainty: 5",
        "Uncertainty 5",
        "```",
        "Uncertainty: 5\n```\n```",
    ] {
        assert_eq!(prompt::parse(text), None, "{text:?}");
    }
}

#[test]
fn what_dresses_an_answer_up_changes_nothing() {
    for text in [
        "Uncertainty: 85%",
        "Uncertainty: 85 %",
        "Uncertainty: 85.0%.",
        "Uncertainty: 85/100",
        "Uncertainty: 85 / 100.",
        "Uncertainty: **85**/100",
        "Uncertainty: 85.",
        "Uncertainty: 85.00.",
        "uncertainty: 85",
        "UNCERTAINTY: 85",
        "Uncertainty : 85",
        "**Uncertainty: 85**",
        "**Uncertainty:** 85",
        "**Uncertainty**: **85%**",
        "Uncertainty: *85*.",
        "__Uncertainty: 85__",
        "`Uncertainty: 85`",
        "Uncertainty: `85`",
        "```\nUncertainty: 85\n```",
        "Experts differ.\n```text\nUncertainty: 85\n```\n",
        "```Uncertainty: 85```",
        "Uncertainty: 85<|im_end|>",
        "Uncertainty: 85</s>\n",
        "Uncertainty: 85\n<|eot_id|>",
        "```\nUncertainty: 85\n```<end_of_turn><eos>",
        "Uncertainty: ８５",
        "Uncertainty：85",
        "Uncertainty： ８５．０％。",
    ] {
        assert_eq!(prompt::parse(text), Some(0.85), "{text:?}");
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
