//! One chart: an SVG that stretches with its box, and labels that do not.
//!
//! The SVG has a view box of 1000 by 1000 that is stretched to whatever size the box has; strokes
//! keep their width (`non-scaling-stroke`), and a dot is a line of length zero with a round cap,
//! which stays round. Tick labels and band names are HTML at places in percent. The script of the
//! page reads values back from the drawn paths by the axes in `data-` attributes, so that each
//! figure stands in the page once.

use super::curve::{Series, thinned};
use super::html::escape;
use super::scale::Scale;

/// What every chart of a page has in common: its x axis in tokens, its bands and its marks.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) x: Scale,
    pub(super) bands: Vec<Band>,
    pub(super) marks: Vec<Mark>,
}

/// A context stage behind the curves.
#[derive(Debug)]
pub(super) struct Band {
    pub(super) name: String,
    pub(super) detail: String,
    pub(super) from: f64,
    pub(super) to: f64,
}

/// Something that happened at a place on the x axis.
#[derive(Debug)]
pub(super) struct Mark {
    pub(super) kind: MarkKind,
    pub(super) x: f64,
    pub(super) detail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MarkKind {
    /// A square on the x axis.
    Checkpoint,
    /// A dashed line.
    Resume,
    /// A dashed line in the colour of trouble.
    Rollback,
    /// A dot under the upper edge, in the colour of trouble.
    Skip,
}

impl MarkKind {
    pub(super) const ALL: [Self; 4] = [Self::Checkpoint, Self::Resume, Self::Rollback, Self::Skip];

    /// Class of the mark and of its swatch in the legend.
    pub(super) fn class(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Resume => "resume",
            Self::Rollback => "rollback",
            Self::Skip => "skip",
        }
    }

    /// Its name in the legend.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Resume => "resumed here",
            Self::Rollback => "rolled back to here",
            Self::Skip => "skipped step",
        }
    }

    /// Its path at `x` of 1000.
    fn path(self, x: f64) -> String {
        match self {
            Self::Checkpoint => format!("M{x:.2} 1000h0"),
            Self::Resume | Self::Rollback => format!("M{x:.2} 0V1000"),
            Self::Skip => format!("M{x:.2} 25h0"),
        }
    }
}

/// How a curve is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    /// The measured values, faint, where a smoothed line stands before them.
    Raw,
    /// The line to look at.
    Line,
    /// Dots joined by a thin line, for values measured now and then.
    Dots,
}

#[derive(Debug)]
pub(super) struct Curve {
    pub(super) name: String,
    pub(super) look: Look,
    pub(super) series: Series,
}

/// A chart over the frame of its page.
#[derive(Debug)]
pub(super) struct Chart<'a> {
    /// Identifies the chart inside the page: a lower-case word.
    pub(super) id: &'a str,
    pub(super) title: &'a str,
    /// What stands on the y axis, with its unit.
    pub(super) caption: &'a str,
    /// What the curves say, for those who do not see them.
    pub(super) description: String,
    /// Whether the looks of the curves are explained.
    pub(super) legend: bool,
    pub(super) y: Scale,
    pub(super) curves: Vec<Curve>,
}

impl Chart<'_> {
    /// The chart as a `figure` element.
    pub(super) fn html(&self, frame: &Frame) -> String {
        let (id, title) = (self.id, escape(self.title));
        let scale = if self.y.log { ", log axis" } else { "" };
        let mut html = format!(
            "<figure class=\"chart {id}\" id=\"{id}\">\n<figcaption><h3>{title}</h3>\
             <span class=\"caption\">{}{scale}</span><span class=\"legend\">{}</span></figcaption>\n\
             <div class=\"plot\" data-x=\"{} {}\" data-y=\"{} {} {}\">\n",
            escape(self.caption),
            self.legend_entries(),
            frame.x.low,
            frame.x.high,
            self.y.low,
            self.y.high,
            if self.y.log { "log" } else { "linear" },
        );
        html.push_str(&format!(
            "<svg viewBox=\"0 0 1000 1000\" preserveAspectRatio=\"none\" role=\"img\" \
             aria-labelledby=\"{id}-title {id}-description\">\n<title id=\"{id}-title\">{title}\
             </title>\n<desc id=\"{id}-description\">{}</desc>\n",
            escape(&self.description)
        ));
        self.push_background(frame, &mut html);
        for curve in &self.curves {
            push_curve(curve, &frame.x, &self.y, &mut html);
        }
        for mark in &frame.marks {
            html.push_str(&format!(
                "<path class=\"mark {}\" d=\"{}\"><title>{}</title></path>\n",
                mark.kind.class(),
                mark.kind.path(1000.0 * frame.x.position(mark.x)),
                escape(&mark.detail)
            ));
        }
        html.push_str("</svg>\n");
        self.push_labels(frame, &mut html);
        html.push_str("</div>\n</figure>\n");
        html
    }

    fn legend_entries(&self) -> String {
        let entry = |curve: &Curve| {
            let class = look_class(curve.look);
            format!("<span class=\"key {class}\">{}</span>", escape(&curve.name))
        };
        // The small charts draw what the large one explains.
        if self.legend {
            self.curves.iter().map(entry).collect()
        } else {
            String::new()
        }
    }

    /// Bands and grid, behind the curves.
    fn push_background(&self, frame: &Frame, html: &mut String) {
        for band in &frame.bands {
            let (from, to) = (
                1000.0 * frame.x.position(band.from),
                1000.0 * frame.x.position(band.to),
            );
            html.push_str(&format!(
                "<rect class=\"band\" x=\"{from:.2}\" y=\"0\" width=\"{:.2}\" height=\"1000\">\
                 <title>{}</title></rect>\n",
                (to - from).max(0.0),
                escape(&band.detail)
            ));
        }
        let mut grid = String::new();
        for tick in self.y.ticks() {
            grid.push_str(&format!(
                "M0 {:.2}H1000",
                1000.0 * (1.0 - self.y.position(tick))
            ));
        }
        html.push_str(&format!("<path class=\"grid\" d=\"{grid}\"/>\n"));
    }

    fn push_labels(&self, frame: &Frame, html: &mut String) {
        for band in &frame.bands {
            let (from, to) = (
                100.0 * frame.x.position(band.from),
                100.0 * frame.x.position(band.to),
            );
            // On a small chart there is no room for the name of a short stage.
            let narrow = if to - from < 8.0 { " narrow" } else { "" };
            html.push_str(&format!(
                "<span class=\"band-name{narrow}\" aria-hidden=\"true\" style=\"left:{from:.3}%;\
                 width:{:.3}%\">{}</span>\n",
                (to - from).max(0.0),
                escape(&band.name)
            ));
        }
        for (axis, scale) in [("x", &frame.x), ("y", &self.y)] {
            let side = if axis == "x" { "left" } else { "bottom" };
            for (tick, label) in scale.ticks().into_iter().zip(scale.labels()) {
                html.push_str(&format!(
                    "<span class=\"tick {axis}\" aria-hidden=\"true\" style=\"{side}:{:.3}%\">\
                     {label}</span>\n",
                    100.0 * scale.position(tick)
                ));
            }
        }
    }
}

fn look_class(look: Look) -> &'static str {
    match look {
        Look::Raw => "raw",
        Look::Line => "line",
        Look::Dots => "dots",
    }
}

fn push_curve(curve: &Curve, x: &Scale, y: &Scale, html: &mut String) {
    let series = thinned(&curve.series, x.high);
    let places: Series = series
        .iter()
        .map(|(tokens, value)| {
            (
                1000.0 * x.position(*tokens),
                1000.0 * (1.0 - y.position(*value)),
            )
        })
        .collect();
    let (class, name) = (look_class(curve.look), escape(&curve.name));
    let line = path(&places);
    // One value alone would be a speck as wide as the line.
    let class = if places.len() == 1 {
        format!("{class} single")
    } else {
        class.to_owned()
    };
    html.push_str(&format!(
        "<path class=\"curve {class}\" data-name=\"{name}\" d=\"{line}\"/>\n"
    ));
    if curve.look == Look::Dots {
        let finite = places.iter().filter(|(_, y)| y.is_finite());
        let dots: String = finite.map(|(x, y)| format!("M{x:.2} {y:.2}h0")).collect();
        html.push_str(&format!("<path class=\"dot\" d=\"{dots}\"/>\n"));
    }
}

/// The path through the points, broken where a value is missing. A point without neighbours gets a
/// line of length zero, which the round caps show as a dot.
fn path(places: &[(f64, f64)]) -> String {
    let mut path = String::with_capacity(places.len() * 14);
    for run in places.split(|(_, y)| !y.is_finite()) {
        for (index, (x, y)) in run.iter().enumerate() {
            path.push_str(&format!(
                "{}{x:.2} {y:.2}",
                if index == 0 { 'M' } else { 'L' }
            ));
        }
        if run.len() == 1 {
            path.push_str("h0");
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_breaks_at_missing_values() {
        let places = [
            (0.0, 1.0),
            (1.0, 2.0),
            (2.0, f64::NAN),
            (3.0, 4.0),
            (4.0, f64::NAN),
        ];
        assert_eq!(path(&places), "M0.00 1.00L1.00 2.00M3.00 4.00h0");
        assert_eq!(path(&[]), "");
    }
}
