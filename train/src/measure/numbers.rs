//! Numbers that JSON has none for: written as null (by serde_json), read back as NaN.

use serde::{Deserialize, Deserializer};

fn known(x: Option<f64>) -> f64 {
    x.unwrap_or(f64::NAN)
}
pub(super) fn one<'d, D: Deserializer<'d>>(d: D) -> Result<f64, D::Error> {
    Option::deserialize(d).map(known)
}
pub(super) fn many<'d, D: Deserializer<'d>>(d: D) -> Result<Vec<f64>, D::Error> {
    Ok(Vec::<Option<f64>>::deserialize(d)?.into_iter().map(known).collect())
}
pub(super) fn many_of_many<'d, D: Deserializer<'d>>(d: D) -> Result<Vec<Vec<f64>>, D::Error> {
    Ok(Vec::<Vec<Option<f64>>>::deserialize(d)?.into_iter().map(|v| v.into_iter().map(known).collect()).collect())
}
