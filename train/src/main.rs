//! The `tidegate` command line; see [`tidegate_train::cli`].
use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate_train::cli::main()
}
