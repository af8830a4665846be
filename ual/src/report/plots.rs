//! Pictures of the results, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, element::DashedPathElement, prelude::*};

use crate::report::{
    curve::Point,
    run::{Group, PARTS, Run},
};

const SIZE: (u32, u32) = (1000, 500);

/// How a method is drawn, the same in every picture.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    pub color: RGBColor,
    /// Dashes and gaps, in pixels. Where curves coincide, those below show in the gaps.
    pub dash: (u32, u32),
}

impl Look {
    pub fn of(method: &str) -> Self {
        let (color, dash) = match method {
            "SFT" => ((0, 114, 178), SOLID),
            "constant" => ((213, 94, 0), (14, 6)),
            "UAL" => ((0, 158, 115), (3, 5)),
            "shuffled" => ((204, 121, 167), (8, 8)),
            "UAL, unigram" => ((230, 159, 0), (2, 10)),
            "UAL, responses" => ((0, 0, 0), (10, 4)),
            "constant, unigram" => ((120, 60, 160), (6, 8)),
            "constant, responses" => ((150, 150, 0), (9, 9)),
            "UAL, own entropy" => ((130, 90, 44), (6, 3)),
            _ => ((86, 180, 233), (5, 11)),
        };
        let (r, g, b) = color;
        Self {
            color: RGBColor(r, g, b),
            dash,
        }
    }

    fn line<Coord: Clone>(
        self,
        points: Vec<Coord>,
    ) -> DashedPathElement<std::vec::IntoIter<Coord>, u32> {
        let (dash, gap) = self.dash;
        DashedPathElement::new(points, dash, gap, self.color.stroke_width(2))
    }

    /// For the legend, at a position in pixels.
    fn sample(self, (x, y): (i32, i32)) -> DashedPathElement<std::vec::IntoIter<(i32, i32)>, u32> {
        self.line(vec![(x, y), (x + SAMPLE, y)])
    }
}

/// A dash longer than any picture's lines.
const SOLID: (u32, u32) = (1_000_000, 1);
/// Pixels of a line in the legend.
const SAMPLE: i32 = 30;
const FONT: (&str, u32) = ("sans-serif", 15);

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Accuracy over confidence, for certain and uncertain samples; the larger a circle, the more rows are in its bin.
pub fn reliability(path: &Path, runs: &[Run]) -> Result<()> {
    draw(path, |panel, side| {
        let group = PARTS[side];
        let Some(first) = runs.first() else {
            return Ok(());
        };
        let title = format!("{} samples", first.groups[group].name);
        let mut chart = ChartBuilder::on(panel)
            .caption(title, FONT)
            .margin(10)
            .margin_right(20)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
        chart
            .configure_mesh()
            .x_desc("confidence")
            .y_desc("accuracy")
            .max_light_lines(0)
            .draw()?;
        chart.draw_series(LineSeries::new([(0.0, 0.0), (1.0, 1.0)], BLACK.mix(0.4)))?;
        for run in runs {
            let look = Look::of(run.method);
            let Group { reliability, .. } = &run.groups[group];
            let bins: Vec<_> = reliability.iter().filter(|bin| bin.rows > 0).collect();
            let rows: usize = bins.iter().map(|bin| bin.rows).sum();
            let means = bins.iter().map(|bin| (bin.confidence, bin.accuracy));
            chart
                .draw_series([look.line(means.collect())])?
                .label(run.method)
                .legend(move |at| look.sample(at));
            chart.draw_series(bins.iter().map(|bin| {
                let radius = 2.0 + 12.0 * (bin.rows as f64 / rows as f64).sqrt();
                Circle::new(
                    (bin.confidence, bin.accuracy),
                    radius as i32,
                    look.color.mix(0.6).filled(),
                )
            }))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .legend_area_size(SAMPLE + 8)
            .label_font(FONT)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        Ok(())
    })
}

/// Negative log-likelihood over steps, of training batches and of the held-out samples.
pub fn losses(path: &Path, runs: &[Run]) -> Result<()> {
    draw(path, |panel, side| {
        let curves: Vec<Vec<(usize, f64)>> = runs
            .iter()
            .map(|run| {
                let nll = |p: &Point| {
                    if side == 0 {
                        p.train_nll
                    } else {
                        p.held_out_nll
                    }
                };
                run.training
                    .points
                    .iter()
                    .map(|p| (p.step, nll(p)))
                    .collect()
            })
            .collect();
        let steps = runs.iter().flat_map(|run| &run.training.points);
        let steps = steps.map(|p| p.step).fold(1, usize::max);
        // Both panels have one scale: the distance between them is the overfitting.
        let points = runs.iter().flat_map(|run| &run.training.points);
        let top = points
            .map(|p| p.train_nll.max(p.held_out_nll))
            .fold(0.1, f64::max);
        let mut chart = ChartBuilder::on(panel)
            .caption(["training", "held out"][side], FONT)
            .margin(10)
            .margin_right(20)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d((0..steps).with_key_points(ticks(steps)), 0.0..top * 1.05)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .y_desc("NLL, nats a token")
            .max_light_lines(0)
            .draw()?;
        for (run, curve) in runs.iter().zip(curves) {
            let look = Look::of(run.method);
            chart
                .draw_series([look.line(curve)])?
                .label(run.method)
                .legend(move |at| look.sample(at));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerLeft)
            .legend_area_size(SAMPLE + 8)
            .label_font(FONT)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
        Ok(())
    })
}

/// Two panels side by side in one file.
fn draw(
    path: &Path,
    panel: impl Fn(&Panel, usize) -> Result<(), DrawingAreaErrorKind<std::io::Error>>,
) -> Result<()> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    let all = || {
        root.fill(&WHITE)?;
        for (side, area) in root.split_evenly((1, 2)).iter().enumerate() {
            panel(area, side)?;
        }
        root.present()
    };
    all().map_err(|e| anyhow!("cannot draw {}: {e}", path.display()))
}

/// At most nine whole steps, 1, 2 or 5 times a power of ten apart.
fn ticks(steps: usize) -> Vec<usize> {
    let units = (0..).flat_map(|power| [1, 2, 5].map(|digit| digit * 10usize.pow(power)));
    let unit = units.into_iter().find(|unit| steps / unit <= 8);
    (0..=steps).step_by(unit.unwrap_or(steps)).collect()
}
