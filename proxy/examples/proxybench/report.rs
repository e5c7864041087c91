//! Results as a table and as JSON.

use serde_json::{Value, json};

#[derive(Default)]
pub struct Report {
    rows: Vec<Value>,
}

impl Report {
    /// One result; `good` says whether the target is met. `note` is for a person.
    pub fn row(&mut self, name: &str, value: f64, unit: &str, target: &str, good: bool, note: &str) {
        let mark = if good { "ok  " } else { "MISS" };
        println!("{mark} {name:<46} {value:>9.2} {unit:<4} {target:<9} {note}");
        self.rows.push(
            json!({"name": name, "value": value, "unit": unit, "target": target, "met": good, "note": note}),
        );
    }

    /// At most.
    pub fn at_most(&mut self, name: &str, value: f64, unit: &str, limit: f64, note: &str) {
        self.row(name, value, unit, &format!("<= {limit}"), value <= limit, note);
    }

    pub fn to_json(&self) -> String {
        format!("{:#}", Value::Array(self.rows.clone()))
    }
}

/// The value below which a share of all lies.
pub fn percentile(values: &mut [f64], p: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * p) as usize]
}
