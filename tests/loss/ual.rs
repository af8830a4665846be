//! The map from uncertainty to smoothing: its mean, order and bounds, its errors, and that it can be saved.

use crate::common::{cases, uniform};
use candle_core::Device;
use candle_cross_entropy::ual::{self, Shape, SmoothingMap};
use rand::{Rng, rngs::StdRng};

/// Uncertainties of very different sizes, some of them 0 or below.
fn uncertainties(rng: &mut StdRng) -> Vec<f32> {
    let one = |rng: &mut StdRng| match rng.random_range(0..7) {
        0..4 => uniform(rng, 0.0..1.0),
        4 => 0.0,
        5 => uniform(rng, -1.0..0.0),
        _ => 10f32.powi(rng.random_range(-20..20)),
    };
    (0..rng.random_range(1..60)).map(|_| one(rng)).collect()
}

/// Closer together, so that no power of their ratio leaves f32's range.
fn closer_uncertainties(rng: &mut StdRng) -> Vec<f32> {
    let one = |rng: &mut StdRng| match rng.random_range(0..6) {
        0..4 => f32::from(rng.random_range(0..=100u8)), // many are equal
        4 => uniform(rng, 0.01..100.0),
        _ => uniform(rng, -1.0..0.0),
    };
    (0..rng.random_range(1..60)).map(|_| one(rng)).collect()
}

/// A data set, some of it above 0, with a mean that it can reach and the maximum.
fn with_mean(rng: &mut StdRng, uncertainties: fn(&mut StdRng) -> Vec<f32>) -> (Vec<f32>, f32, f32) {
    loop {
        let u = uncertainties(rng);
        let (share, max) = (uniform(rng, 0.0..=1.0), uniform(rng, 0.0..=1.0));
        let positive = u.iter().filter(|&&u| u > 0.0).count();
        if positive > 0 {
            let reachable = max * positive as f32 / u.len() as f32;
            return (u, share * reachable, max);
        }
    }
}

fn fittable(rng: &mut StdRng) -> (Vec<f32>, f32, f32) {
    with_mean(rng, uncertainties)
}

/// The same, in every shape.
fn fittable_by_all(rng: &mut StdRng) -> (Vec<f32>, f32, f32) {
    with_mean(rng, closer_uncertainties)
}

fn shape(rng: &mut StdRng) -> Shape {
    match rng.random_range(0..5) {
        0 => Shape::Linear,
        1 => Shape::Power(uniform(rng, 0.1..4.0)),
        2 => Shape::Rank,
        3 => Shape::Floor(uniform(rng, 0.0..=1.0)),
        _ => Shape::Constant,
    }
}

fn mean_smoothing(map: &SmoothingMap, uncertainties: &[f32]) -> f64 {
    let sum: f64 = uncertainties
        .iter()
        .map(|&u| f64::from(map.smoothing(u).unwrap()))
        .sum();
    sum / uncertainties.len() as f64
}

fn message(uncertainties: &[f32], mean: f32, max: f32) -> String {
    SmoothingMap::fit(uncertainties, mean, max)
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn the_mean_is_met_also_under_clipping() {
    cases(|rng| {
        let (u, mean, max) = fittable(rng);
        let map = SmoothingMap::fit(&u, mean, max).unwrap();
        let got = mean_smoothing(&map, &u);
        assert!(
            (got - f64::from(mean)).abs() <= 1e-6 * f64::from(mean),
            "mean {got}, asked for {mean}"
        );
    });
}

#[test]
fn values_keep_the_order_and_the_bounds() {
    cases(|rng| {
        let (u, mean, max) = fittable(rng);
        let others = uncertainties(rng);
        let map = SmoothingMap::fit(&u, mean, max).unwrap();
        let mut all = [u, others].concat(); // also samples that it was not fitted on
        all.sort_by(f32::total_cmp);
        let smoothing: Vec<f32> = all.iter().map(|&u| map.smoothing(u).unwrap()).collect();
        assert!(
            smoothing.windows(2).all(|pair| pair[0] <= pair[1]),
            "{all:?} -> {smoothing:?}"
        );
        assert!(
            smoothing.iter().all(|e| (0.0..=max).contains(e)),
            "{smoothing:?}, max {max}"
        );
        assert!(
            all.iter()
                .zip(&smoothing)
                .all(|(&u, &e)| u > 0.0 || e == 0.0),
            "{all:?} -> {smoothing:?}"
        );
    });
}

#[test]
fn below_the_maximum_it_is_proportional() {
    cases(|rng| {
        let of_one = |rng: &mut StdRng| uniform(rng, 0.01..1.0);
        let u: Vec<f32> = (0..rng.random_range(1..60)).map(|_| of_one(rng)).collect();
        let (a, b) = (of_one(rng), of_one(rng));
        let mean = uniform(rng, 0.001..0.01);
        let map = SmoothingMap::fit(&u, mean, 1.0).unwrap(); // no value reaches 1
        let (x, y) = (map.smoothing(a).unwrap(), map.smoothing(b).unwrap());
        assert!(
            (x / y - a / b).abs() <= 1e-5 * (a / b),
            "{a} -> {x}, {b} -> {y}"
        );
    });
}

#[test]
fn the_unit_of_uncertainty_does_not_matter() {
    cases(|rng| {
        let (u, mean, max) = fittable(rng);
        let unit = 2f32.powi(rng.random_range(-10..10)); // exact in f32
        let scaled: Vec<f32> = u.iter().map(|u| u * unit).collect();
        let (map, other) = (
            SmoothingMap::fit(&u, mean, max).unwrap(),
            SmoothingMap::fit(&scaled, mean, max).unwrap(),
        );
        for (&u, &v) in u.iter().zip(&scaled) {
            assert_eq!(map.smoothing(u).unwrap(), other.smoothing(v).unwrap());
        }
    });
}

#[test]
fn it_is_the_same_after_saving() {
    cases(|rng| {
        let (u, mean, max) = fittable(rng);
        let map = SmoothingMap::fit(&u, mean, max).unwrap();
        let saved = serde_json::to_string(&map).unwrap();
        assert_eq!(
            serde_json::from_str::<SmoothingMap>(&saved).unwrap(),
            map,
            "{saved}"
        );
    });
}

#[test]
fn every_shape_meets_the_mean() {
    cases(|rng| {
        let (u, mean, max) = fittable_by_all(rng);
        let shape = shape(rng);
        let map = SmoothingMap::fit_shape(shape, &u, mean, max).unwrap();
        assert_eq!(map.shape(), shape);
        let got = mean_smoothing(&map, &u);
        assert!(
            (got - f64::from(mean)).abs() <= 1e-6 * f64::from(mean),
            "mean {got}, asked for {mean}"
        );
    });
}

#[test]
fn every_shape_keeps_the_order_and_the_bounds() {
    cases(|rng| {
        let (u, mean, max) = fittable_by_all(rng);
        let (shape, others) = (shape(rng), uncertainties(rng));
        let map = SmoothingMap::fit_shape(shape, &u, mean, max).unwrap();
        let mut all = [u, others, vec![f32::MAX, f32::MIN]].concat();
        all.sort_by(f32::total_cmp);
        let smoothing = map.smoothing_values(&all).unwrap();
        assert!(
            smoothing.windows(2).all(|pair| pair[0] <= pair[1]),
            "{all:?} -> {smoothing:?}"
        );
        assert!(
            smoothing.iter().all(|e| (0.0..=max).contains(e)),
            "{smoothing:?}, max {max}"
        );
        if matches!(shape, Shape::Linear | Shape::Power(_)) {
            assert!(
                all.iter()
                    .zip(&smoothing)
                    .all(|(&u, &e)| u > 0.0 || e == 0.0),
                "{all:?} -> {smoothing:?}"
            );
        }
        for (pair, smoothing) in all.windows(2).zip(smoothing.windows(2)) {
            assert!(
                pair[0] != pair[1] || smoothing[0] == smoothing[1],
                "{pair:?} -> {smoothing:?}"
            );
        }
    });
}

#[test]
fn every_shape_is_the_same_after_saving() {
    cases(|rng| {
        let (u, mean, max) = fittable_by_all(rng);
        let shape = shape(rng);
        let map = SmoothingMap::fit_shape(shape, &u, mean, max).unwrap();
        let saved = serde_json::to_string(&map).unwrap();
        assert_eq!(
            serde_json::from_str::<SmoothingMap>(&saved).unwrap(),
            map,
            "{saved}"
        );
    });
}

#[test]
fn only_the_order_matters_to_ranks() {
    cases(|rng| {
        let (u, bent, mean, max) = loop {
            let (u, mean, max) = fittable_by_all(rng);
            let bent: Vec<f32> = u.iter().map(|u| u.cbrt()).collect();
            let same_order =
                |(a, b): (&f32, &f32)| u.iter().zip(&bent).all(|(c, d)| (a < c) == (b < d));
            if u.iter().zip(&bent).all(same_order) {
                break (u, bent, mean, max);
            }
        };
        let map = SmoothingMap::fit_shape(Shape::Rank, &u, mean, max).unwrap();
        let other = SmoothingMap::fit_shape(Shape::Rank, &bent, mean, max).unwrap();
        assert_eq!(
            map.smoothing_values(&u).unwrap(),
            other.smoothing_values(&bent).unwrap()
        );
    });
}

#[test]
fn a_power_of_one_is_linear() {
    cases(|rng| {
        let (u, mean, max) = fittable_by_all(rng);
        let linear = SmoothingMap::fit(&u, mean, max).unwrap();
        let power = SmoothingMap::fit_shape(Shape::Power(1.0), &u, mean, max).unwrap();
        for (a, b) in linear
            .smoothing_values(&u)
            .unwrap()
            .into_iter()
            .zip(power.smoothing_values(&u).unwrap())
        {
            assert!((a - b).abs() <= 1e-6 * a, "{a} and {b}");
        }
    });
}

#[test]
fn a_value_that_is_not_finite_is_named() {
    cases(|rng| {
        let mut u = uncertainties(rng);
        let at = rng.random_range(0..u.len());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            u[at] = bad;
            let wanted = format!("uncertainties[{at}] is {bad}");
            assert!(message(&u, 0.0, 0.5).contains(&wanted));
            let map = SmoothingMap::fit(&[1.0], 0.1, 0.5).unwrap();
            assert!(
                map.smoothing_column(&u, &Device::Cpu)
                    .unwrap_err()
                    .to_string()
                    .contains(&wanted)
            );
            let text = map.smoothing(bad).unwrap_err().to_string();
            let wanted = format!("uncertainty is {bad}");
            assert!(text.contains(&wanted), "{text}");
        }
    });
}

#[test]
fn an_example_by_hand() {
    // 0.3 is clipped at 0.2; the other three share 4·0.1 − 0.2 in proportion 0 : 1 : 1.
    let map = SmoothingMap::fit(&[0.3, 0.0, 0.1, 0.1], 0.1, 0.2).unwrap();
    let column = map
        .smoothing_column(&[0.3, 0.0, 0.1, 0.05, 9.0, -1.0], &Device::Cpu)
        .unwrap();
    assert_eq!(column.dims(), [6, 1]);
    let values = column.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for (value, wanted) in values.iter().zip([0.2, 0.0, 0.1, 0.05, 0.2, 0.0]) {
        assert!((value - wanted).abs() < 1e-7, "{values:?}");
    }
}

#[test]
fn the_other_shapes_by_hand() {
    let fit = |shape| SmoothingMap::fit_shape(shape, &[4.0, 1.0, 2.0, 1.0], 0.22, 0.5).unwrap();
    let check = |shape, uncertainties: &[f32], wanted: &[f32]| {
        let values = fit(shape).smoothing_values(uncertainties).unwrap();
        for (value, wanted) in values.iter().zip(wanted) {
            assert!((value - wanted).abs() < 1e-7, "{shape:?}: {values:?}");
        }
    };
    // Squares are 16, 1, 4, 1; the first is clipped, and the others share 4·0.22 − 0.5 in proportion 1 : 4 : 1.
    let third = 0.38 / 6.0;
    check(
        Shape::Power(2.0),
        &[4.0, 1.0, 2.0, 3.0, -1.0],
        &[0.5, third, 4.0 * third, 0.5, 0.0],
    );
    // Mid-ranks of 1, 1, 2, 4 are 1, 1, 2.5, 3.5 of 4, their mean is 2; between them and outside.
    check(
        Shape::Rank,
        &[1.0, 2.0, 4.0, 3.0, 1.5, -9.0, 9.0],
        &[0.11, 0.275, 0.385, 0.33, 0.1925, 0.11, 0.385],
    );
    // The mean uncertainty is 2, so that heights are 0.25 + 0.75·u/2; their mean is 1.
    check(
        Shape::Floor(0.25),
        &[4.0, 1.0, 2.0, 0.0, -1.0],
        &[0.22 * 1.75, 0.22 * 0.625, 0.22, 0.055, 0.055],
    );
    check(Shape::Constant, &[-1.0, 4.0], &[0.22, 0.22]);
}

#[test]
fn ranks_and_constants_reach_means_that_zeros_do_not() {
    for shape in [Shape::Rank, Shape::Floor(0.1), Shape::Constant] {
        let map = SmoothingMap::fit_shape(shape, &[0.0, 0.0, -1.0], 0.2, 0.2).unwrap();
        let got = mean_smoothing(&map, &[0.0, 0.0, -1.0]);
        assert!((got - 0.2).abs() < 1e-7, "{shape:?}: {got}");
    }
}

#[test]
fn a_missing_uncertainty_is_named_by_its_sample() {
    assert_eq!(
        ual::collect([("a", Some(0.5)), ("b", Some(-1.0))]).unwrap(),
        [0.5, -1.0]
    );
    for (bad, wanted) in [
        (None, "sample b has no uncertainty"),
        (
            Some(f32::NAN),
            "sample b: uncertainty is NaN; it must be finite",
        ),
        (Some(f32::NEG_INFINITY), "sample b: uncertainty is -inf"),
    ] {
        let error = ual::collect([("a", Some(0.5)), ("b", bad), ("c", None)]).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
    }
}

#[test]
fn a_map_saved_before_there_were_shapes_is_linear() {
    let map: SmoothingMap = serde_json::from_str(r#"{"scale": 0.25, "max": 0.5}"#).unwrap();
    assert_eq!(
        (map.shape(), map.scale(), map.max()),
        (Shape::Linear, 0.25, 0.5)
    );
    assert_eq!(map.smoothing_values(&[1.0, 9.0]).unwrap(), [0.25, 0.5]);
}

#[test]
fn a_floor_of_0_is_linear_and_of_1_constant() {
    cases(|rng| {
        let (u, mean, max) = fittable_by_all(rng);
        let fit = |shape| SmoothingMap::fit_shape(shape, &u, mean, max).unwrap();
        for (floor, other) in [(0.0, Shape::Linear), (1.0, Shape::Constant)] {
            let values = fit(Shape::Floor(floor)).smoothing_values(&u).unwrap();
            let others = fit(other).smoothing_values(&u).unwrap();
            for (a, b) in values.iter().zip(&others) {
                assert!((a - b).abs() <= 1e-6 * b, "{a} and {b}");
            }
        }
    });
}

#[test]
fn a_floor_that_is_no_share_is_refused() {
    for floor in [-0.1, 1.1, f32::NAN, f32::INFINITY] {
        let error = SmoothingMap::fit_shape(Shape::Floor(floor), &[1.0], 0.1, 0.5).unwrap_err();
        let wanted = format!("floor is {floor}; it must be in [0, 1]");
        assert!(error.to_string().contains(&wanted), "{error}");
    }
}

#[test]
fn an_exponent_that_is_not_above_0_is_refused() {
    for exponent in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let error = SmoothingMap::fit_shape(Shape::Power(exponent), &[1.0], 0.1, 0.5).unwrap_err();
        let wanted = format!("exponent is {exponent}; it must be finite and above 0");
        assert!(error.to_string().contains(&wanted), "{error}");
    }
}

#[test]
fn the_largest_mean_that_can_be_reached_is_reached() {
    let map = SmoothingMap::fit(&[0.5, 0.001], 0.2, 0.2).unwrap();
    assert_eq!(
        (map.smoothing(0.5).unwrap(), map.smoothing(0.001).unwrap()),
        (0.2, 0.2)
    );
}

#[test]
fn a_mean_that_cannot_be_reached_is_refused() {
    let text = message(&[0.0, 0.0, 0.5, -1.0], 0.1, 0.2);
    assert!(
        text.contains("mean is 0.1")
            && text.contains("at most 0.05")
            && text.contains("1 are above 0"),
        "{text}"
    );
    let text = message(&[0.0, 0.0], 0.1, 0.2);
    assert!(text.contains("at most 0:"), "{text}");
    assert!(message(&[1e-44], 1.0, 1.0).contains("too small"));
}

#[test]
fn scalars_out_of_range_are_refused() {
    for max in [-0.1, 1.1, f32::NAN, f32::INFINITY] {
        assert!(message(&[0.5], 0.0, max).contains(&format!("max is {max}; it must be in [0, 1]")));
    }
    for mean in [-0.1, 0.21, f32::NAN] {
        assert!(
            message(&[0.5], mean, 0.2).contains(&format!("mean is {mean}; it must be in [0, max]"))
        );
    }
    assert!(message(&[], 0.1, 0.2).contains("uncertainties is empty"));
}

#[test]
fn a_saved_map_that_was_edited_badly_is_refused() {
    for (text, wanted) in [
        (r#"{"scale": -1.0, "max": 0.5}"#, "scale is -1"),
        (r#"{"scale": 1.0, "max": 1.5}"#, "max is 1.5"),
        (r#"{"scale": 1.0}"#, "missing field `max`"),
        (r#"{"shape": "cubic", "scale": 1.0, "max": 0.5}"#, "cubic"),
        (
            r#"{"shape": {"power": {"exponent": -1, "unit": 1}}, "scale": 1.0, "max": 0.5}"#,
            "exponent is -1",
        ),
        (
            r#"{"shape": {"power": {"exponent": 1, "unit": 0}}, "scale": 1.0, "max": 0.5}"#,
            "unit is 0",
        ),
        (
            r#"{"shape": {"floor": {"floor": 2, "mean": 1}}, "scale": 1.0, "max": 0.5}"#,
            "floor is 2",
        ),
        (
            r#"{"shape": {"floor": {"floor": 0.5, "mean": 0}}, "scale": 1.0, "max": 0.5}"#,
            "mean is 0",
        ),
        (
            r#"{"shape": {"rank": {"uncertainties": [1, 2], "ranks": [0.5]}}, "scale": 1.0, "max": 0.5}"#,
            "uncertainties has 2 values and ranks 1",
        ),
        (
            r#"{"shape": {"rank": {"uncertainties": [1, 1], "ranks": [0.5, 0.6]}}, "scale": 1.0, "max": 0.5}"#,
            "uncertainties must be finite and ascending",
        ),
        (
            r#"{"shape": {"rank": {"uncertainties": [1, 2], "ranks": [0.5, 0.4]}}, "scale": 1.0, "max": 0.5}"#,
            "ranks must be in [0, 1]",
        ),
    ] {
        let error = serde_json::from_str::<SmoothingMap>(text)
            .expect_err("must be refused")
            .to_string();
        assert!(error.contains(wanted), "{error}");
    }
}
