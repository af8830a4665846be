//! The figure: peak memory and time against the budget.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::Cost;

const FONT: (&str, u32) = ("sans-serif", 15);
const LINEAR: RGBColor = RGBColor(0, 114, 178);
const WHOLE: RGBColor = RGBColor(213, 94, 0);

pub fn draw(path: &Path, title: &str, costs: &[Cost], whole: Cost) -> Result<()> {
    let root = SVGBackend::new(path, (1000, 420)).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("{error}");
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    let root = root
        .titled(title, ("sans-serif", 18))
        .map_err(|error| failed(&error))?;
    let panels = root.split_evenly((1, 2));
    type Measure = (&'static str, fn(&Cost) -> f64);
    let measures: [Measure; 2] = [
        ("peak memory, MiB", |cost| cost.mib),
        ("seconds", |cost| cost.seconds),
    ];
    for (panel, (name, value)) in panels.iter().zip(measures) {
        let last = costs.last().map_or(1.0, |cost| cost.budget);
        let highest = costs.iter().chain([&whole]).map(value).fold(0.0, f64::max);
        let mut chart = ChartBuilder::on(panel)
            .margin(10)
            .margin_right(25)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..last, 0.0..1.15 * highest)?;
        chart
            .configure_mesh()
            .x_desc("memory_budget, MiB of logits kept")
            .y_desc(name)
            .x_label_formatter(&|mib| mib.to_string())
            .y_label_formatter(&|value| value.to_string())
            .max_light_lines(0)
            .draw()?;
        let points = || costs.iter().map(|cost| (cost.budget, value(cost)));
        chart
            .draw_series(LineSeries::new(points(), LINEAR.stroke_width(2)))?
            .label("forward_linear")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], LINEAR.stroke_width(2)));
        chart.draw_series(points().map(|point| Circle::new(point, 4, LINEAR.filled())))?;
        let line = [(0.0, value(&whole)), (last, value(&whole))];
        chart
            .draw_series(LineSeries::new(line, WHOLE.stroke_width(2)))?
            .label("whole logits, gradient in place")
            .legend(|(x, y)| PathElement::new([(x, y), (x + 18, y)], WHOLE.stroke_width(2)));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::MiddleRight)
            .label_font(FONT)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
    }
    root.present()?;
    Ok(())
}
