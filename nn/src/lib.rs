//! Layers, mixers, the mixture-of-experts decoder, its configuration, checkpoints and generation.

mod aside;
mod attention;
mod cache;
mod checkpoint;
mod composed;
mod config;
mod decoder;
mod delta_net;
mod error;
mod gates;
mod generate;
mod init;
mod json;
mod layers;
mod mamba2;
mod mixer;
mod norms;
mod save;
mod shards;
mod spelling;
mod state;
mod switch;
mod taps;
pub mod tensor_file;

pub use aside::Aside;
pub use cache::Caches;
pub use composed::composed_slowdown;
pub use config::{
    AttentionGate, GateActivation, GateGranularity, GateOp, GatePosition, LayerType, LinearActivation, LinearQkNorm, ModelConfig, ModelType,
    OutputGate, QkNorm, Recurrence, RopeScaling, RopeType, SwitchHeads, nearest,
};
pub use decoder::{Decoder, Losses, Placement};
pub use error::{Error, Result};
pub use generate::{CHUNK, Generator, Sampler};
pub use layers::Param;
pub use save::SaveOptions;
pub use state::State;
pub use taps::{Access, Observer, Part, TAPS, Tap, on_request};
