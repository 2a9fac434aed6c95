//! Bar charts as SVG text, small enough for a README: bars need no library.

use std::fmt::Write;

/// A group of bars: what was measured, and a value for each series that has one.
pub struct Group {
    pub label: String,
    pub values: Vec<Option<f64>>,
}

const WIDTH: f64 = 760.0;
const LEFT: f64 = 190.0;
const RIGHT: f64 = 70.0;
const TOP: f64 = 56.0;
const BAR: f64 = 13.0;
const GAP: f64 = 10.0;
const COLORS: [&str; 9] = [
    "#1f6fb4", "#9aa5b1", "#c9ced6", "#d9822b", "#5b8f3a", "#8a5fa8", "#b5484b", "#3a9c9c",
    "#777777",
];

/// A chart of groups; `series` names the bars of each, `show` puts a value into words.
pub fn bars(
    title: &str,
    series: &[String],
    groups: &[Group],
    show: impl Fn(f64) -> String,
) -> String {
    let most = groups
        .iter()
        .flat_map(|group| group.values.iter().flatten());
    let most = most.fold(f64::MIN_POSITIVE, |most, value| most.max(*value));
    let scale = (WIDTH - LEFT - RIGHT) / most;
    let mut body = String::new();
    let mut y = TOP;
    for group in groups {
        let bars = group.values.iter().flatten().count() as f64;
        text(
            &mut body,
            LEFT - 8.0,
            y + bars * BAR / 2.0 + 4.0,
            "end",
            &group.label,
        );
        for (index, value) in group.values.iter().enumerate() {
            let Some(value) = value else { continue };
            let (width, color) = ((value * scale).max(1.0), COLORS[index % COLORS.len()]);
            let _infallible = writeln!(
                body,
                r#"<rect x="{LEFT}" y="{y:.0}" width="{width:.0}" height="{:.0}" fill="{color}"/>"#,
                BAR - 2.0
            );
            text(
                &mut body,
                LEFT + width + 4.0,
                y + BAR - 3.0,
                "start",
                &show(*value),
            );
            y += BAR;
        }
        y += GAP;
    }
    let mut head = String::new();
    text(&mut head, LEFT, 18.0, "start", title);
    let mut x = LEFT;
    for (index, name) in series.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let _infallible = writeln!(
            head,
            r#"<rect x="{x:.0}" y="28" width="10" height="10" fill="{color}"/>"#
        );
        text(&mut head, x + 14.0, 37.0, "start", name);
        x += 28.0 + 7.0 * name.len() as f64;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y:.0}\" \
         viewBox=\"0 0 {WIDTH} {y:.0}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{head}{body}</svg>\n"
    )
}

fn text(out: &mut String, x: f64, y: f64, anchor: &str, words: &str) {
    let words = words.replace('&', "&amp;").replace('<', "&lt;");
    let _infallible = writeln!(
        out,
        r#"<text x="{x:.0}" y="{y:.0}" text-anchor="{anchor}">{words}</text>"#
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values() {
        let groups = [Group {
            label: "a < b".to_owned(),
            values: vec![Some(1.0), None, Some(2.0)],
        }];
        let series = ["one", "two", "three"].map(str::to_owned);
        let chart = bars("Title", &series, &groups, |value| format!("{value}"));
        assert!(chart.starts_with("<svg ") && chart.ends_with("</svg>\n"));
        assert!(chart.contains("a &lt; b"));
        let full = WIDTH - LEFT - RIGHT;
        assert!(chart.contains(&format!("width=\"{full:.0}\"")), "{chart}");
        assert!(
            chart.contains(&format!("width=\"{:.0}\"", full / 2.0)),
            "{chart}"
        );
        assert_eq!(chart.matches("<rect").count(), 1 + 3 + 2);
    }
}
