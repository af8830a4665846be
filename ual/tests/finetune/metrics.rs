//! Metrics against values by hand.

use candle_ual::report::metrics::{
    Row, expected_calibration_error, reliability, split, summarise, threshold,
};

fn row(confidence: f64, correct: bool) -> Row {
    Row {
        uncertainty: 0.5,
        group: 0,
        nll: 1.0,
        entropy: 2.0,
        confidence,
        correct: f64::from(u8::from(correct)),
        brier: 0.5,
        kl: None,
    }
}

#[test]
fn calibration_error_by_hand() {
    // Two bins: confidence 0.9 with accuracy 1/2 (two rows), confidence 0.3 with accuracy 1 (one row).
    let rows = [row(0.9, true), row(0.9, false), row(0.3, true)];
    let ece = expected_calibration_error(&reliability(&rows));
    assert!((ece - (2.0 * 0.4 + 0.7) / 3.0).abs() < 1e-12, "{ece}");
}

#[test]
fn calibrated_rows_have_no_error() {
    let rows: Vec<Row> = (0..10).map(|i| row(0.7, i < 7)).collect();
    assert!(expected_calibration_error(&reliability(&rows)) < 1e-12);
    assert_eq!(expected_calibration_error(&reliability(&[])), 0.0);
}

#[test]
fn bins_include_their_upper_edge() {
    let bins = reliability(&[
        row(1.0 / 15.0, true),
        row(1.0 / 15.0 + 1e-9, true),
        row(1.0, false),
        row(0.0, false),
    ]);
    let counts: Vec<usize> = bins.iter().map(|bin| bin.rows).collect();
    assert_eq!(counts, [2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(
        (bins[0].accuracy, bins[14].accuracy, bins[14].confidence),
        (0.5, 0.0, 1.0)
    );
}

#[test]
fn summaries_are_means() {
    let mut rows = [row(0.5, true), row(0.5, false)];
    rows[0].nll = 3.0;
    rows[0].kl = Some(0.25);
    rows[1].kl = Some(0.75);
    let summary = summarise(&rows).unwrap();
    assert_eq!(
        (summary.rows, summary.nll, summary.entropy, summary.brier),
        (2, 2.0, 2.0, 0.5)
    );
    assert_eq!((summary.accuracy, summary.kl), (0.5, Some(0.5)));
    assert!(summarise(&[]).is_none());
}

#[test]
fn the_median_parts_certain_from_uncertain() {
    let rows = [0.1, 0.9, 0.2, 0.5].map(|uncertainty| Row {
        uncertainty,
        ..row(0.5, true)
    });
    let middle = threshold(rows.iter().map(|row| row.uncertainty).collect()).unwrap();
    assert_eq!(middle, 0.5);
    let (certain, uncertain) = split(&rows, middle);
    assert_eq!(
        certain
            .iter()
            .map(|row| row.uncertainty)
            .collect::<Vec<_>>(),
        [0.1, 0.2]
    );
    assert_eq!(uncertain.len(), 2);
    assert_eq!(threshold(Vec::new()), None);
    // Neither part is empty unless all are equal.
    assert_eq!(threshold(vec![0.0, 0.8, 0.0, 0.3, 0.0]), Some(0.3));
    assert_eq!(threshold(vec![0.1, 0.8, 0.8, 0.8]), Some(0.8));
    assert_eq!(threshold(vec![0.5; 3]), Some(0.5));
}

#[test]
fn a_bootstrap_interval_covers_what_it_should() {
    use candle_ual::report::statistics::bootstrap;
    // Of normal values an interval of the mean is ±1.96 standard errors, less a factor of √(1 − 1/n).
    let normal = |i: usize| {
        let u = (i as f64 + 0.5) / 400.0;
        (u / (1.0 - u)).ln() // logistic quantiles: variance π²/3
    };
    let values: Vec<f64> = (0..400).map(|i| 5.0 + normal(i)).collect();
    let interval = bootstrap(&values).unwrap();
    let error = (std::f64::consts::PI.powi(2) / 3.0 / 400.0).sqrt();
    assert!((interval.mean - 5.0).abs() < 1e-9);
    assert!(
        (interval.high - 5.0 - 1.96 * error).abs() < 0.1 * error,
        "{interval:?}"
    );
    assert!(
        (interval.low - 5.0 + 1.96 * error).abs() < 0.1 * error,
        "{interval:?}"
    );
    assert!(interval.excludes_0() && !bootstrap(&[-1.0, 1.0]).unwrap().excludes_0());
    assert_eq!(bootstrap(&values), Some(interval));
    assert_eq!(bootstrap(&[2.0, 2.0]).unwrap().low, 2.0);
    assert_eq!(bootstrap(&[2.0]), None);
}
