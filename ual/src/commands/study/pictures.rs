//! Smoothing against uncertainty, and the clusters of tokens, as SVG.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::{
    commands::study::{arms::UAL, clusters::Points},
    report::plots::Look,
};

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
        let color = Look::of(UAL).color.mix(0.4);
        let circles = points.iter().map(|&p| Circle::new(p, 3, color.filled()));
        chart.draw_series(circles)?;
        root.present()
    };
    named(path, draw())
}

/// A panel a method: its states along their two directions of largest variance, all panels on one scale. `name` says
/// which token a cluster is of.
pub fn projections(
    path: &Path,
    methods: &[(&'static str, Points)],
    name: impl Fn(u32) -> String,
) -> Result<()> {
    let projected: Vec<Vec<(f64, f64)>> = methods.iter().map(|(_, p)| p.projection()).collect();
    let largest = |value: fn(&(f64, f64)) -> f64| {
        let values = projected.iter().flatten().map(|p| value(p).abs());
        1.05 * values.fold(0.1, f64::max)
    };
    let (right, top) = (largest(|p| p.0), largest(|p| p.1));
    let draw = || -> Drawn {
        let (width, height, legend) = (1000, 840, 40);
        let root = SVGBackend::new(path, (width, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let (root, below) = root.split_vertically(height - legend);
        let panels = root.split_evenly((methods.len().div_ceil(2), 2));
        for ((panel, (method, points)), projected) in panels.iter().zip(methods).zip(&projected) {
            let mut chart = ChartBuilder::on(panel)
                .caption(*method, FONT)
                .margin(10)
                .margin_right(20)
                .x_label_area_size(40)
                .y_label_area_size(50)
                .build_cartesian_2d(-right..right, -top..top)?;
            chart
                .configure_mesh()
                .x_desc("along the widest direction")
                .y_desc("along the second widest")
                .max_light_lines(0)
                .draw()?;
            let labelled = projected.iter().zip(&points.labels);
            let shown = labelled.filter(|(_, label)| **label < SHOWN);
            chart.draw_series(shown.map(|(&point, &label)| {
                let color = Palette99::pick(label).mix(0.7);
                Circle::new(point, 3, color.filled())
            }))?;
        }
        // Clusters are of the same tokens in every panel: the held-out samples' most frequent.
        let tokens = methods
            .first()
            .map_or(&[][..], |(_, p)| p.tokens.as_slice());
        let step = (width as i32 - 20) / SHOWN as i32;
        for (i, &token) in tokens.iter().take(SHOWN).enumerate() {
            let (x, y) = (20 + step * i as i32, legend as i32 / 2);
            below.draw(&Circle::new((x, y), 5, Palette99::pick(i).filled()))?;
            below.draw(&Text::new(name(token), (x + 10, y - 7), FONT))?;
        }
        root.present()
    };
    named(path, draw())
}
