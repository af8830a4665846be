//! Smoothing against uncertainty, and the clusters of tokens, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::{commands::study::clusters::Points, report::plots::COLORS};

const FONT: (&str, u32) = ("sans-serif", 15);
/// So many clusters are told apart by colour.
const SHOWN: usize = 8;

type Drawn = std::result::Result<(), DrawingAreaErrorKind<std::io::Error>>;

fn named(path: &Path, drawn: Drawn) -> Result<()> {
    drawn.map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))
}

/// A point a training sample.
pub fn smoothing(path: &Path, points: &[(f32, f32)]) -> Result<()> {
    let draw = || -> Drawn {
        let root = SVGBackend::new(path, (500, 400)).into_drawing_area();
        root.fill(&WHITE)?;
        let right = points.iter().map(|p| p.0).fold(0.01, f32::max);
        let top = points.iter().map(|p| p.1).fold(0.01, f32::max);
        let mut chart = ChartBuilder::on(&root)
            .margin(10)
            .margin_right(20)
            .x_label_area_size(40)
            .y_label_area_size(50)
            .build_cartesian_2d(0f32..right * 1.02, 0f32..top * 1.05)?;
        chart
            .configure_mesh()
            .x_desc("uncertainty")
            .y_desc("smoothing")
            .max_light_lines(0)
            .draw()?;
        let circles = points
            .iter()
            .map(|&p| Circle::new(p, 3, COLORS[0].mix(0.4).filled()));
        chart.draw_series(circles)?;
        root.present()
    };
    named(path, draw())
}

/// A panel a method: its states along their two directions of largest variance.
pub fn projections(path: &Path, methods: &[(&'static str, Points)]) -> Result<()> {
    let draw = || -> Drawn {
        let root = SVGBackend::new(path, (1000, 800)).into_drawing_area();
        root.fill(&WHITE)?;
        let panels = root.split_evenly((methods.len().div_ceil(2), 2));
        for (panel, (name, points)) in panels.iter().zip(methods) {
            let projected = points.projection();
            let largest = |value: fn(&(f64, f64)) -> f64| {
                1.05 * projected.iter().map(|p| value(p).abs()).fold(0.1, f64::max)
            };
            let (x, y) = (largest(|p| p.0), largest(|p| p.1));
            let mut chart = ChartBuilder::on(panel)
                .caption(*name, FONT)
                .margin(10)
                .x_label_area_size(25)
                .y_label_area_size(40)
                .build_cartesian_2d(-x..x, -y..y)?;
            chart.configure_mesh().max_light_lines(0).draw()?;
            let labelled = projected.iter().zip(&points.labels);
            let shown = labelled.filter(|(_, label)| **label < SHOWN);
            chart.draw_series(shown.map(|(&point, &label)| {
                let color = Palette99::pick(label).mix(0.7);
                Circle::new(point, 3, color.filled())
            }))?;
        }
        root.present()
    };
    named(path, draw())
}
