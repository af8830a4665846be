//! Pictures of the results, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::{coord::Shift, prelude::*};

use crate::report::{
    curve::Point,
    run::{Group, PARTS, Run},
};

const SIZE: (u32, u32) = (1000, 500);
pub const COLORS: [RGBColor; 5] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
];
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
        for (run, color) in runs.iter().zip(COLORS) {
            let Group { reliability, .. } = &run.groups[group];
            let bins: Vec<_> = reliability.iter().filter(|bin| bin.rows > 0).collect();
            let rows: usize = bins.iter().map(|bin| bin.rows).sum();
            chart
                .draw_series(LineSeries::new(
                    bins.iter().map(|bin| (bin.confidence, bin.accuracy)),
                    color,
                ))?
                .label(run.method)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                });
            chart.draw_series(bins.iter().map(|bin| {
                let radius = 2.0 + 12.0 * (bin.rows as f64 / rows as f64).sqrt();
                Circle::new(
                    (bin.confidence, bin.accuracy),
                    radius as i32,
                    color.mix(0.6).filled(),
                )
            }))?;
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
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
        let curves: Vec<Vec<(f64, f64)>> = runs
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
                    .map(|p| (p.step as f64, nll(p)))
                    .collect()
            })
            .collect();
        let steps = curves.iter().flatten().map(|p| p.0).fold(1.0, f64::max);
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
            .build_cartesian_2d(0.0..steps, 0.0..top * 1.05)?;
        chart
            .configure_mesh()
            .x_desc("step")
            .x_label_formatter(&|step| format!("{step:.0}"))
            .y_desc("NLL, nats a token")
            .max_light_lines(0)
            .draw()?;
        for ((run, color), curve) in runs.iter().zip(COLORS).zip(curves) {
            chart
                .draw_series(LineSeries::new(curve, color.stroke_width(2)))?
                .label(run.method)
                .legend(move |(x, y)| {
                    PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2))
                });
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerLeft)
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
