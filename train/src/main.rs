//! The `tidegate` command line; see [`train::cli`].
use std::process::ExitCode;

fn main() -> ExitCode {
    train::cli::main()
}
