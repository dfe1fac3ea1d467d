//! The error type of training: each message says what was asked, what was found, and what to do.

use std::path::{Path, PathBuf};

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("{action} {}: {source}{}", path.display(), hint(source))]
    Io {
        /// What was being done, as "reading", "writing".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The results could not be written where they belong.
    #[error("writing results to stdout: {0}")]
    Output(std::io::Error),
    /// The data can't be used.
    #[error("data {}: {message}", path.display())]
    Data {
        /// The file or folder asked for.
        path: PathBuf,
        /// What was found and what to do.
        message: String,
    },
    /// The command line or the configuration is wrong; the process exits with code 2.
    #[error("{0}")]
    Usage(String),
    /// A checkpoint or run folder can't be used.
    #[error("{0}")]
    Checkpoint(String),
    /// A loss or a gradient is not finite.
    #[error("{0}")]
    NonFinite(String),
    /// The model or the engine failed.
    #[error("{0}")]
    Model(String),
}

fn hint(e: &std::io::Error) -> &'static str {
    match e.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            " (the disk is full: free some space, or lower `checkpoint.keep`, then go on with --resume)"
        }
        _ => "",
    }
}

impl Error {
    /// An [`Error::Io`], as a closure for `map_err`.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source }
    }
    /// An [`Error::Data`].
    pub fn data(path: &Path, message: impl Into<String>) -> Error {
        Error::Data { path: path.to_path_buf(), message: message.into() }
    }
    /// The exit code of a process that ends with this error: 2 for wrong usage, else 1.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, Error::Usage(_)) { 2 } else { 1 }
    }
}

impl From<engine::Error> for Error {
    fn from(e: engine::Error) -> Error {
        Error::Model(e.to_string())
    }
}

impl From<nn::Error> for Error {
    fn from(e: nn::Error) -> Error {
        match e {
            nn::Error::Io { path, source } => Error::Io { action: "file", path, source },
            e => Error::Model(e.to_string()),
        }
    }
}
