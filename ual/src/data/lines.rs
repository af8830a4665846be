//! JSON objects.

use std::fmt;

use anyhow::{Result, anyhow};
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};
use serde_json::{Map, Value};

/// A line's object. An error has the column. A field that is there twice is one: which was meant is not known.
pub fn object(line: &str) -> Result<Map<String, Value>> {
    let object: Object = serde_json::from_str(line).map_err(|e| {
        // serde_json counts lines inside the one it was given.
        let message = e.to_string();
        let message = message.split(" at line ").next().unwrap_or(&message);
        anyhow!("{message} (column {})", e.column())
    })?;
    Ok(object.0)
}

struct Object(Map<String, Value>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Fields)
    }
}

struct Fields;

impl<'de> Visitor<'de> for Fields {
    type Value = Object;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Object, A::Error> {
        let mut fields = Map::new();
        while let Some(name) = access.next_key::<String>()? {
            if fields.contains_key(&name) {
                return Err(A::Error::custom(format_args!(
                    "the field {name:?} is there twice"
                )));
            }
            fields.insert(name, access.next_value()?);
        }
        Ok(Object(fields))
    }
}
