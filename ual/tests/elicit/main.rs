//! `ual elicit`: run as a process against a server that behaves as one is told, and against a small local model; and the
//! documents' commands.

mod guide;
mod job;
mod local;
mod model;
mod parsing;
mod requests;
mod resume;
mod server;
mod servers;
