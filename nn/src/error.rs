//! What can go wrong with a model.

use std::path::{Path, PathBuf};

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The errors of models, configurations and checkpoints.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration that describes no model.
    #[error("model configuration: {0}")]
    Config(String),
    /// A checkpoint that does not fit, or is no checkpoint.
    #[error("{path}: {msg}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        msg: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A request that makes no sense for this model.
    #[error("{0}")]
    Usage(String),
    /// From the engine.
    #[error(transparent)]
    Engine(#[from] engine::Error),
}

impl Error {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |source| Error::Io { path: path.to_path_buf(), source }
    }
    pub(crate) fn checkpoint(path: &Path, msg: impl Into<String>) -> Error {
        Error::Checkpoint { path: path.to_path_buf(), msg: msg.into() }
    }
}
