//! Statistics as tables: a printer for JSON values that knows shapes, not fields.
//!
//! | shape | shown as |
//! | --- | --- |
//! | object with `buckets`, `count`, `sum`, `max` | histogram: a line, bars for its values |
//! | list of objects, or object of objects of the same fields | table; histograms side by side |
//! | other object | its fields, one a line, sub-objects as sections |
//!
//! A field's name says its unit: `_bytes` becomes KiB, MiB..., `_ns` and `_us` become a time.

use serde_json::{Map, Value};

use super::size::format_size;

/// Width of the longest bar of a histogram.
const BAR_WIDTH: u64 = 40;

/// Prints a value for people.
pub fn render(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(fields) => section(&mut out, "", fields),
        other => out.push_str(&scalar("", other)),
    }
    out
}

fn section(out: &mut String, path: &str, fields: &Map<String, Value>) {
    let plain: Vec<(&String, String)> = fields
        .iter()
        .filter(|(_, value)| is_scalar(value))
        .map(|(name, value)| (name, scalar(name, value)))
        .collect();
    if !plain.is_empty() {
        heading(out, path);
        let width = plain
            .iter()
            .map(|(name, _)| label(name).chars().count())
            .max()
            .unwrap_or(0);
        for (name, text) in plain {
            out.push_str(&format!("  {:width$}  {text}\n", label(name)));
        }
    }
    for (name, value) in fields {
        let path = if path.is_empty() {
            label(name)
        } else {
            format!("{path} / {}", label(name))
        };
        match value {
            Value::Object(inner) if is_histogram(inner) => {
                heading(out, &path);
                histogram(out, name, inner);
            }
            Value::Object(inner) => match rows_of(inner) {
                Some(rows) => table(out, &path, &rows),
                None => section(out, &path, inner),
            },
            Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_object) => {
                list(out, &path, items);
            }
            _ => {}
        }
    }
}

fn heading(out: &mut String, path: &str) {
    if path.is_empty() {
        return;
    }
    if !out.is_empty() {
        out.push('\n');
    }
    out.push_str(path);
    out.push('\n');
}

/// A list of objects: a table of their plain fields, then a table for each object that they all
/// have inside, with the mean of each histogram, then the histograms, a column for each item.
fn list(out: &mut String, path: &str, items: &[Value]) {
    let rows: Vec<(String, &Map<String, Value>)> = items
        .iter()
        .enumerate()
        .filter_map(|(index, item)| Some((row_name(index, item), item.as_object()?)))
        .collect();
    same_kind(out, path, &rows);
}

/// Objects of the same kind, by name.
fn same_kind(out: &mut String, path: &str, rows: &[(String, &Map<String, Value>)]) {
    let Some((_, first)) = rows.first() else {
        return;
    };
    table(out, path, rows);
    for (name, value) in first.iter() {
        let path = format!("{path} / {}", label(name));
        let inner: Vec<(String, &Map<String, Value>)> = rows
            .iter()
            .filter_map(|(row, fields)| Some((row.clone(), fields.get(name)?.as_object()?)))
            .collect();
        match value {
            Value::Object(fields) if is_histogram(fields) => {
                histogram_columns(out, &path, name, &inner);
            }
            Value::Object(_) => same_kind(out, &path, &inner),
            _ => {}
        }
    }
}

/// Histograms of the same thing side by side.
fn histogram_columns(
    out: &mut String,
    path: &str,
    name: &str,
    columns: &[(String, &Map<String, Value>)],
) {
    let buckets: Vec<Vec<u64>> = columns
        .iter()
        .map(|(_, fields)| buckets_of(fields))
        .collect();
    let used = |index: &usize| {
        buckets
            .iter()
            .any(|b| b.get(*index).is_some_and(|&n| n > 0))
    };
    let len = buckets.iter().map(Vec::len).max().unwrap_or(0);
    let (Some(first), Some(last)) = ((0..len).find(used), (0..len).rfind(used)) else {
        return;
    };
    let heads = columns.iter().map(|(name, _)| name.clone());
    let mut lines = vec![
        std::iter::once(String::new())
            .chain(heads)
            .collect::<Vec<_>>(),
    ];
    for index in first..=last {
        let cells = buckets
            .iter()
            .map(|b| b.get(index).copied().unwrap_or(0).to_string());
        lines.push(std::iter::once(below(name, index)).chain(cells).collect());
    }
    heading(out, path);
    grid(out, &lines);
}

fn row_name(index: usize, item: &Value) -> String {
    match item.get("name").and_then(Value::as_str) {
        Some(name) => name.to_owned(),
        None => index.to_string(),
    }
}

/// The rows of an object whose values are all objects of plain fields, the same ones.
fn rows_of(fields: &Map<String, Value>) -> Option<Vec<(String, &Map<String, Value>)>> {
    let rows: Vec<_> = fields
        .iter()
        .map(|(name, value)| Some((label(name), value.as_object()?)))
        .collect::<Option<_>>()?;
    let first = rows.first()?.1;
    let alike =
        |row: &Map<String, Value>| row.keys().eq(first.keys()) && row.values().all(is_scalar);
    rows.iter()
        .all(|(_, row)| !is_histogram(row) && alike(row))
        .then_some(rows)
}

fn table(out: &mut String, path: &str, rows: &[(String, &Map<String, Value>)]) {
    let Some((_, first)) = rows.first() else {
        return;
    };
    let columns: Vec<&String> = first
        .iter()
        .filter(|(name, value)| is_cell(value) && name.as_str() != "name")
        .map(|(name, _)| name)
        .collect();
    if columns.is_empty() {
        return;
    }
    let mut lines = vec![
        std::iter::once(String::new())
            .chain(columns.iter().map(|name| label(name)))
            .collect::<Vec<_>>(),
    ];
    for (name, fields) in rows {
        let cells = columns.iter().map(|column| {
            fields
                .get(*column)
                .map_or_else(String::new, |value| cell(column, value))
        });
        lines.push(std::iter::once(name.clone()).chain(cells).collect());
    }
    heading(out, path);
    grid(out, &lines);
}

/// Lines of cells in columns: the first to the left, the others to the right.
pub fn grid(out: &mut String, lines: &[Vec<String>]) {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|at| {
            lines
                .iter()
                .filter_map(|line| Some(line.get(at)?.chars().count()))
                .max()
        })
        .map(|width| width.unwrap_or(0))
        .collect();
    for line in lines {
        let mut text = String::from("  ");
        for (at, (cell, width)) in line.iter().zip(&widths).enumerate() {
            text.push_str(&match at {
                0 => format!("{cell:width$}"),
                _ => format!("  {cell:>width$}"),
            });
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
}

/// Whether a table shows it in a cell.
fn is_cell(value: &Value) -> bool {
    is_scalar(value) || value.as_object().is_some_and(is_histogram)
}

/// A cell: a plain value, or the mean of a histogram.
fn cell(name: &str, value: &Value) -> String {
    match value {
        Value::Object(fields) => quantity(name, mean(fields)),
        plain => scalar(name, plain),
    }
}

fn mean(histogram: &Map<String, Value>) -> u64 {
    number(histogram, "sum")
        .checked_div(number(histogram, "count"))
        .unwrap_or(0)
}

fn number(fields: &Map<String, Value>, name: &str) -> u64 {
    fields.get(name).and_then(Value::as_u64).unwrap_or(0)
}

fn is_scalar(value: &Value) -> bool {
    match value {
        Value::Object(_) => false,
        Value::Array(items) => items
            .iter()
            .all(|item| !item.is_object() && !item.is_array()),
        _ => true,
    }
}

fn is_histogram(fields: &Map<String, Value>) -> bool {
    fields.get("buckets").is_some_and(Value::is_array)
        && ["count", "sum", "max"]
            .iter()
            .all(|name| fields.get(*name).is_some_and(Value::is_u64))
}

fn buckets_of(histogram: &Map<String, Value>) -> Vec<u64> {
    let buckets = histogram.get("buckets").and_then(Value::as_array);
    buckets
        .into_iter()
        .flatten()
        .map(|bucket| bucket.as_u64().unwrap_or(0))
        .collect()
}

/// Bucket n holds values below 2^n that no lower bucket took.
fn below(name: &str, index: usize) -> String {
    let shift = u32::try_from(index).unwrap_or(u32::MAX);
    format!(
        "< {}",
        quantity(name, 1_u64.checked_shl(shift).unwrap_or(u64::MAX))
    )
}

/// One histogram, with bars.
fn histogram(out: &mut String, name: &str, fields: &Map<String, Value>) {
    out.push_str(&format!(
        "  count {}  mean {}  max {}\n",
        number(fields, "count"),
        quantity(name, mean(fields)),
        quantity(name, number(fields, "max"))
    ));
    let buckets = buckets_of(fields);
    let Some(first) = buckets.iter().position(|&bucket| bucket > 0) else {
        return;
    };
    let last = buckets
        .iter()
        .rposition(|&bucket| bucket > 0)
        .unwrap_or(first);
    let most = buckets.iter().copied().max().unwrap_or(1).max(1);
    let rows: Vec<(String, u64)> = (first..=last)
        .map(|index| (below(name, index), buckets[index]))
        .collect();
    let width = rows
        .iter()
        .map(|(below, _)| below.chars().count())
        .max()
        .unwrap_or(0);
    let digits = most.to_string().len();
    for (below, bucket) in rows {
        let bar = u128::from(bucket) * u128::from(BAR_WIDTH) / u128::from(most);
        let bar = usize::try_from(bar)
            .unwrap_or(0)
            .max(usize::from(bucket > 0));
        let line = format!("  {below:>width$}  {bucket:>digits$}  {}", "#".repeat(bar));
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

/// A field's name for people.
fn label(name: &str) -> String {
    let stem = ["_bytes", "_ns", "_us"]
        .iter()
        .find_map(|unit| name.strip_suffix(unit));
    stem.unwrap_or(name).replace('_', " ")
}

fn scalar(name: &str, value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) => match number.as_u64() {
            Some(number) => quantity(name, number),
            None => match number.as_f64() {
                Some(number) if number.fract() != 0.0 => format!("{number:.2}"),
                _ => number.to_string(),
            },
        },
        Value::Array(items) => items
            .iter()
            .map(|item| scalar(name, item))
            .collect::<Vec<_>>()
            .join(" "),
        Value::Object(_) => String::new(),
    }
}

/// A number with the unit that its field's name tells.
fn quantity(name: &str, number: u64) -> String {
    if name.ends_with("_bytes") || name == "bytes" || name.contains("_bytes_") {
        format_size(number)
    } else if name.ends_with("_ns") {
        time(number)
    } else if name.ends_with("_us") {
        time(number.saturating_mul(1000))
    } else {
        number.to_string()
    }
}

/// A time in its natural unit.
pub fn time(nanos: u64) -> String {
    let (unit, name) = match nanos {
        0..1_000 => return format!("{nanos} ns"),
        1_000..1_000_000 => (1_000, "us"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    let tenths = u128::from(nanos) * 10 / unit;
    if tenths >= 1_000 || tenths % 10 == 0 {
        format!("{} {name}", tenths / 10)
    } else {
        format!("{}.{} {name}", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn fields_with_units() {
        let text = render(
            &json!({ "dirty_bytes": 1536, "latency_ns": 1_500_000, "clean": true,
            "ratio": 0.5, "names": ["a", "b"], "reads": 7, "read_bytes_bounced": 4096 }),
        );
        for line in [
            "dirty               1.5 KiB",
            "latency             1.5 ms",
            "clean               yes",
            "ratio               0.50",
            "names               a b",
            "reads               7",
            "read bytes bounced  4 KiB",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn equal_objects_become_a_table() {
        let text = render(&json!({ "requests": {
            "read": { "count": 10, "mean_us": 20 }, "write": { "count": 3, "mean_us": 4000 } } }));
        assert_eq!(
            text,
            "requests\n         count   mean\n  read      10  20 us\n  write      3   4 ms\n"
        );
    }

    #[test]
    fn lists_of_devices_become_a_table_with_their_histograms_below() {
        let hist = json!({ "buckets": [0, 1, 0, 4], "count": 5, "sum": 21, "max": 7 });
        let text = render(&json!({ "volume": { "kiobufs": 9, "devices": [
            { "name": "/d/0", "queued": 1, "write": { "request_bytes": hist } },
            { "name": "/d/1", "queued": 0, "write": { "request_bytes": hist } } ] } }));
        for part in [
            "volume / devices\n        queued\n  /d/0       1\n",
            "volume / devices / write\n        request\n  /d/0      4 B\n",
            "volume / devices / write / request\n         /d/0  /d/1\n  < 2 B     1     1\n",
            "  < 8 B     4     4\n",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_histogram_alone_has_bars() {
        let text = render(&json!({ "size_bytes":
            { "buckets": [0, 1, 0, 4], "count": 5, "sum": 21, "max": 7 } }));
        assert!(
            text.contains("size\n  count 5  mean 4 B  max 7 B\n"),
            "{text}"
        );
        assert!(text.contains("  < 8 B  4  ########"), "{text}");
        assert!(text.contains("  < 4 B  0\n"), "{text}");
    }

    #[test]
    fn odd_shapes_do_not_matter() {
        for value in [
            json!(null),
            json!([1, 2]),
            json!({}),
            json!({ "a": {} }),
            json!({ "a": [] }),
            json!({ "h": { "buckets": [], "count": 0, "sum": 0, "max": 0 } }),
            json!({ "h": { "buckets": ["x"], "count": 1, "sum": 0, "max": 0 } }),
            json!({ "a": [{ "x": 1 }, { "y": 2 }] }),
            json!({ "a": { "b": 1, "c": { "d": 1 } } }),
        ] {
            let _text = render(&value);
        }
    }

    #[test]
    fn times() {
        assert_eq!(time(999), "999 ns");
        assert_eq!(time(1_000), "1 us");
        assert_eq!(time(12_340), "12.3 us");
        assert_eq!(time(123_456), "123 us");
        assert_eq!(time(60_000_000_000), "60 s");
    }
}
