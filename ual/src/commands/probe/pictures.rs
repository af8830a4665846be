//! Divergence over sizes, epochs and smoothings, and the best smoothing over uncertainty, as SVG.

use std::{collections::BTreeMap, ops::Range, path::Path};

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, prelude::*};

use crate::{
    commands::probe::{
        args::Args,
        arms::{Method, Spread},
        compare::{ArmName, METRICS, values},
        outcome::{Ending, Outcome},
        stretches::{OfStretch, Stretch, best_of_seeds},
        summary::{Results, is_shown},
    },
    report::metrics::mean,
};

const SIZE: (u32, u32) = (1000, 480);
const FONT: (&str, u32) = ("sans-serif", 15);

type Points = Vec<(f64, f64)>;
type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

/// Lines over a logarithmic axis.
struct Panel {
    title: String,
    x: &'static str,
    /// Where its lines leave room.
    legend: SeriesLabelPosition,
    lines: Vec<(ArmName, Points)>,
}

/// A colour a method; what spreads its smoothing by frequencies is drawn thinner and with circles.
fn color(method: Method) -> RGBColor {
    let (r, g, b) = match method {
        Method::Plain => (0, 114, 178),
        Method::Constant => (213, 94, 0),
        Method::Shuffled => (204, 121, 167),
        Method::Floor => (0, 0, 0),
        _ => (0, 158, 115),
    };
    RGBColor(r, g, b)
}

fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, largest) = values.fold((f64::INFINITY, 0f64), |(least, largest), value| {
        (least.min(value), largest.max(value))
    });
    match least.is_finite() {
        true => least..largest.max(least * 1.01),
        false => 0.0..1.0,
    }
}

fn panels(path: &Path, panels: &[Panel; 2]) -> Result<()> {
    let draw = || -> Drawn {
        let root = SVGBackend::new(path, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        for (area, panel) in root.split_evenly((1, 2)).iter().zip(panels) {
            self::panel(area, panel)?;
        }
        root.present()
    };
    draw().map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

fn panel(area: &DrawingArea<SVGBackend, Shift>, panel: &Panel) -> Drawn {
    let x = range(
        panel
            .lines
            .iter()
            .flat_map(|(_, points)| points)
            .map(|point| point.0),
    );
    let points = panel.lines.iter().flat_map(|(_, points)| points);
    let y = range(points.map(|point| point.1));
    let y = y.start * 0.97..y.end * 1.03;
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, FONT)
        .margin(10)
        .margin_right(20)
        .x_label_area_size(40)
        .y_label_area_size(50)
        .build_cartesian_2d(x.log_scale(), y)?;
    chart
        .configure_mesh()
        .x_desc(panel.x)
        .y_desc("KL from people's responses, nats")
        .x_labels(6)
        .x_label_formatter(&|x| format!("{}", (x * 1e6).round() / 1e6))
        .max_light_lines(0)
        .draw()?;
    for (arm, points) in &panel.lines {
        let by_frequencies = arm.1 == Spread::Frequencies;
        let style = color(arm.0).stroke_width(if by_frequencies { 1 } else { 2 });
        chart
            .draw_series(LineSeries::new(points.clone(), style))?
            .label(arm.to_string())
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 25, y)], style));
        if by_frequencies {
            let circles = points.iter().map(|&at| Circle::new(at, 3, style));
            chart.draw_series(circles)?;
        }
    }
    chart
        .configure_series_labels()
        .position(panel.legend.clone())
        .legend_area_size(33)
        .label_font(FONT)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
}

fn shown(results: &Results) -> Vec<ArmName> {
    results
        .arms()
        .into_iter()
        .filter(|&arm| is_shown(arm))
        .collect()
}

/// Each arm at its best, over the number of samples.
pub fn sizes(path: &Path, results: &Results, args: &Args) -> Result<()> {
    let (_, kl) = METRICS[0];
    let panel = |(ending, title): (Ending, &str)| {
        let line = |arm| {
            let point = |&size: &usize| {
                let values = values(&results.of_size(size), arm, ending, 0, kl);
                Some((size as f64, mean(values.into_iter())?))
            };
            (arm, args.sizes.iter().filter_map(point).collect())
        };
        Panel {
            title: title.into(),
            x: "samples to train on",
            legend: SeriesLabelPosition::UpperRight,
            lines: shown(results).into_iter().map(line).collect(),
        }
    };
    let endings = [
        (Ending::Early, "early stopping"),
        (Ending::Last, "all epochs"),
    ];
    panels(path, &endings.map(panel))
}

/// A small size and a large one: the second and the last but one.
fn two_sizes(args: &Args) -> [usize; 2] {
    let last = args.sizes.len() - 1;
    [args.sizes[last.min(1)], args.sizes[last.saturating_sub(1)]]
}

/// The trainings that are chosen at the end of all epochs, over epochs.
pub fn epochs(path: &Path, results: &Results, args: &Args) -> Result<()> {
    let panel = |(size, legend): (usize, SeriesLabelPosition)| {
        let outcomes = results.of_size(size);
        let line = |arm: ArmName| {
            let mut of_epochs: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
            for outcome in &outcomes {
                let chosen = outcome.chosen((arm.0, arm.1), Ending::Last);
                for point in chosen.iter().flat_map(|(curve, _)| &curve.points) {
                    let kl = point.parts[0].and_then(|all| all.kl);
                    of_epochs.entry(point.epoch).or_default().extend(kl);
                }
            }
            let points = of_epochs
                .into_iter()
                .filter_map(|(epoch, kl)| Some((epoch as f64, mean(kl.into_iter())?)));
            (arm, points.collect())
        };
        Panel {
            title: format!("{size} samples"),
            x: "epochs",
            legend,
            lines: shown(results).into_iter().map(line).collect(),
        }
    };
    let [small, large] = two_sizes(args);
    // Few samples are overfitted at once, many are learned first.
    let (left, right) = (
        SeriesLabelPosition::UpperLeft,
        SeriesLabelPosition::UpperRight,
    );
    panels(path, &[(small, left), (large, right)].map(panel))
}

/// After all epochs, over mean smoothing; plain training is a line across.
pub fn smoothings(path: &Path, results: &Results, args: &Args) -> Result<()> {
    let panel = |size: usize| {
        let outcomes = results.of_size(size);
        let line = |arm: ArmName| {
            let point = |&smoothing: &f32| {
                let of = |outcome: &&Outcome| {
                    let mut of_arm = outcome.of((arm.0, arm.1));
                    let curve =
                        of_arm.find(|c| c.mean_smoothing == smoothing || arm.0 == Method::Plain)?;
                    curve.end(Ending::Last).parts[0]?.kl
                };
                let kl = mean(outcomes.iter().filter_map(of))?;
                Some((f64::from(smoothing), kl))
            };
            (arm, args.smoothings.iter().filter_map(point).collect())
        };
        Panel {
            title: format!("{size} samples, all epochs"),
            x: "mean smoothing",
            legend: SeriesLabelPosition::LowerLeft,
            lines: shown(results).into_iter().map(line).collect(),
        }
    };
    panels(path, &two_sizes(args).map(panel))
}

/// The best smoothing of samples of an uncertainty, with intervals.
pub fn uncertainty(path: &Path, results: &Results) -> Result<()> {
    let best = |number: usize, ending| {
        let of = results.of_stretches.iter().filter(|o| o.stretch == number);
        best_of_seeds(&of.collect::<Vec<&OfStretch>>(), ending)
    };
    let endings = [
        (Ending::Early, "early stopping", color(Method::Ual)),
        (Ending::Last, "all epochs", color(Method::Plain)),
    ];
    let draw = || -> Drawn {
        let root = SVGBackend::new(path, (600, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let right = results.stretches.last().map_or(1.0, |s| f64::from(s.to));
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .margin_right(20)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(-0.02..right, -0.02..0.85)?;
        chart
            .configure_mesh()
            .x_desc("uncertainty of the samples, their mean")
            .y_desc("best smoothing")
            .max_light_lines(0)
            .draw()?;
        for (place, (ending, name, color)) in endings.into_iter().enumerate() {
            let beside = 0.006 * place as f64; // so that bars do not hide one another
            let of = |(number, stretch): (usize, &Stretch)| {
                Some((f64::from(stretch.mean) + beside, best(number, ending)?))
            };
            let points: Vec<_> = results
                .stretches
                .iter()
                .enumerate()
                .filter_map(of)
                .collect();
            let line = points.iter().map(|(x, interval)| (*x, interval.mean));
            chart
                .draw_series(LineSeries::new(line, color.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 25, y)], color.stroke_width(2))
                });
            let ends = points.iter().map(|&(x, i)| [(x, i.low), (x, i.high)]);
            let bars = ends.map(|ends| PathElement::new(ends, color.stroke_width(2)));
            chart.draw_series(bars)?;
            let middles = points.iter().map(|&(x, interval)| (x, interval.mean));
            chart.draw_series(middles.map(|at| Circle::new(at, 4, color.filled())))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .legend_area_size(33)
            .label_font(FONT)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        root.present()
    };
    draw().map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}
