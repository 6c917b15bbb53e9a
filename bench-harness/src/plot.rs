//! Line charts as SVG.

use std::path::Path;

use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

const SIZE: (u32, u32) = (900, 560);
const FLAT: (u32, u32) = (900, 260);
const PALETTE: [RGBColor; 18] = [
    RGBColor(0, 90, 181),
    RGBColor(220, 50, 32),
    RGBColor(0, 130, 90),
    RGBColor(230, 150, 0),
    RGBColor(120, 60, 160),
    RGBColor(90, 90, 90),
    RGBColor(0, 160, 190),
    RGBColor(160, 80, 40),
    RGBColor(255, 120, 170),
    RGBColor(110, 170, 20),
    RGBColor(20, 40, 90),
    RGBColor(180, 150, 110),
    RGBColor(150, 0, 70),
    RGBColor(100, 150, 240),
    RGBColor(0, 200, 120),
    RGBColor(200, 200, 0),
    RGBColor(255, 90, 0),
    RGBColor(200, 120, 255),
];

/// Pixels of a legend's entry: its height, the line before the name, a letter.
const ENTRY: (i32, i32, i32) = (20, 18, 8);

/// Decades from which on a logarithmic axis has two ticks in each: more would not be read apart.
const WIDE: f64 = 2.5;

/// Opacity of an interval's bar: those of several methods overlap.
const BAR: f64 = 0.45;

/// An axis.
pub struct Axis {
    label: String,
    log: bool,
}

impl Axis {
    /// Linear scale.
    pub fn linear(label: &str) -> Self {
        Self { label: label.into(), log: false }
    }

    /// Logarithmic scale; values must be positive.
    pub fn log(label: &str) -> Self {
        Self { label: label.into(), log: true }
    }
}

/// A named line with a mark at each point.
#[derive(Default)]
pub struct Line {
    /// Legend entry.
    pub name: String,
    /// (x, y).
    pub points: Vec<(f64, f64)>,
    /// Intervals (x, low, high), drawn as bars; they may stand beside the points.
    pub intervals: Vec<(f64, f64, f64)>,
}

fn range(values: impl Iterator<Item = f64>, log: bool) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if !low.is_finite() || !high.is_finite() {
        return 0.1..1.0;
    }
    if log {
        let low = low.max(1e-9);
        return low * 0.85..(high * 1.15).max(low * 1.01);
    }
    let margin = ((high - low) * 0.05).max(1e-9);
    low - margin..high + margin
}

/// Draws a chart to `path`.
///
/// # Errors
/// The drawing library's message, or the file system's.
pub fn chart(path: &Path, title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> Result<(), String> {
    std::fs::write(path, svg(title, x, y, lines)?).map_err(|e| format!("{}: {e}", path.display()))
}

/// A chart as SVG.
///
/// # Errors
/// The drawing library's message.
pub fn svg(title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> Result<String, String> {
    plot(&Sheet { title, size: SIZE, joined: true }, x, y, lines)
}

/// A flat chart of points that are not joined, as SVG.
///
/// # Errors
/// The drawing library's message.
pub fn scatter(title: &str, x: &Axis, y: &Axis, lines: &[Line]) -> Result<String, String> {
    plot(&Sheet { title, size: FLAT, joined: false }, x, y, lines)
}

/// What a chart is drawn on.
struct Sheet<'a> {
    title: &'a str,
    size: (u32, u32),
    /// Points are joined by lines.
    joined: bool,
}

fn plot(sheet: &Sheet<'_>, x: &Axis, y: &Axis, lines: &[Line]) -> Result<String, String> {
    let all = || lines.iter().flat_map(|l| l.points.iter().copied());
    let ends = lines.iter().flat_map(|l| l.intervals.iter().flat_map(|i| [i.1, i.2]));
    let (xs, ys) = (range(all().map(|p| p.0), x.log), range(all().map(|p| p.1).chain(ends), y.log));
    let log = |range: std::ops::Range<f64>| {
        let ticks = ticks(&range);
        range.log_scale().with_key_points(ticks)
    };
    match (x.log, y.log) {
        (false, false) => draw(sheet, x, y, xs, ys, lines),
        (true, false) => draw(sheet, x, y, log(xs), ys, lines),
        (false, true) => draw(sheet, x, y, xs, log(ys), lines),
        (true, true) => draw(sheet, x, y, log(xs), log(ys), lines),
    }
}

/// Round numbers in a range, about evenly spread over a logarithmic axis (the library has none below the first power of ten).
fn ticks(range: &std::ops::Range<f64>) -> Vec<f64> {
    let decades = (range.start.log10().floor() as i32)..=(range.end.log10().ceil() as i32);
    let firsts: &[f64] = if (range.end / range.start).log10() > WIDE { &[1.0, 3.0] } else { &[1.0, 2.0, 3.0, 5.0, 7.0] };
    let of_decade = |exponent: i32| firsts.iter().map(move |first| first * 10f64.powi(exponent));
    decades.flat_map(of_decade).filter(|tick| range.contains(tick)).collect()
}

/// A tick's number, short and unlike its neighbours'.
fn number(v: &f64) -> String {
    if *v == 0.0 {
        "0".to_owned()
    } else if v.abs() < 0.01 || v.abs() >= 1e5 {
        format!("{v:.1e}").replace(".0e", "e")
    } else if v.abs() >= 10.0 {
        format!("{v:.0}")
    } else {
        format!("{v:.2}")
    }
}

fn draw<X, Y>(sheet: &Sheet<'_>, x: &Axis, y: &Axis, xs: X, ys: Y, lines: &[Line]) -> Result<String, String>
where
    X: AsRangedCoord<Value = f64>,
    Y: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
    Y::CoordDescType: ValueFormatter<f64>,
{
    let fail = |e: &dyn std::fmt::Display| e.to_string();
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, sheet.size).into_drawing_area();
    area.fill(&WHITE).map_err(|e| fail(&e))?;
    // beside the chart, where it hides nothing
    let letters = lines.iter().map(|l| l.name.chars().count()).max().unwrap_or(0) as i32;
    let (left, legend) = area.split_horizontally(sheet.size.0 as i32 - 2 * ENTRY.1 - ENTRY.2 * letters);
    let mut chart = ChartBuilder::on(&left)
        .caption(sheet.title, ("sans-serif", 20))
        .margin(12)
        .x_label_area_size(46)
        .y_label_area_size(64)
        .build_cartesian_2d(xs, ys)
        .map_err(|e| fail(&e))?;
    chart
        .configure_mesh()
        .x_desc(&x.label)
        .y_desc(&y.label)
        .x_label_formatter(&number)
        .y_label_formatter(&number)
        .light_line_style(WHITE)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .draw()
        .map_err(|e| fail(&e))?;
    for (i, line) in lines.iter().enumerate() {
        let colour = PALETTE[i % PALETTE.len()];
        chart
            .draw_series(LineSeries::new(line.points.iter().copied().filter(|_| sheet.joined), colour.stroke_width(2)))
            .map_err(|e| fail(&e))?;
        chart.draw_series(line.points.iter().map(|&p| Circle::new(p, 3, colour.filled()))).map_err(|e| fail(&e))?;
        let bars = line.intervals.iter().map(|&(x, low, high)| PathElement::new([(x, low), (x, high)], colour.mix(BAR).stroke_width(1)));
        chart.draw_series(bars).map_err(|e| fail(&e))?;
        let at = 3 * ENTRY.0 / 2 + ENTRY.0 * i as i32;
        legend.draw(&PathElement::new([(0, at), (ENTRY.1, at)], colour.stroke_width(3))).map_err(|e| fail(&e))?;
        legend.draw(&Text::new(line.name.as_str(), (ENTRY.1 + 6, at - 7), ("sans-serif", 14))).map_err(|e| fail(&e))?;
    }
    area.present().map_err(|e| fail(&e))?;
    drop((chart, legend, left, area));
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_ticks_that_can_be_told_apart() {
        let of = |range| ticks(&range).iter().map(|t| format!("{t:.1}")).collect::<Vec<_>>();
        assert_eq!(of(0.13..1.2), ["0.2", "0.3", "0.5", "0.7", "1.0"]);
        assert_eq!(of(400.0..4_000.0), ["500.0", "700.0", "1000.0", "2000.0", "3000.0"]);
        assert_eq!([0.0, 0.001, 0.5, 40.0, 2e5, 1.2e6].map(|v| number(&v)), ["0", "1e-3", "0.50", "40", "2e5", "1.2e6"]);
        assert_eq!(of(0.5..2_000.0), ["1.0", "3.0", "10.0", "30.0", "100.0", "300.0", "1000.0"]);
    }
}
