//! The operator's command.

fn main() -> std::process::ExitCode {
    drover_cli::main()
}
