//! What a command line is taken for.

use clap::{CommandFactory, error::ErrorKind};

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(std::iter::once("drover").chain(line.split_whitespace()))
}

fn migrate(line: &str) -> Migrate {
    match parse(line).unwrap().noun {
        Noun::Instance(InstanceVerb::Migrate(migrate)) => *migrate,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_command_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_verb_parses() {
    for line in [
        "node list",
        "node show kvm1 --json",
        "node disable kvm1 --reason disks --dry-run",
        "node enable kvm1 --no-wait",
        "instance list --host kvm1 --project p",
        "instance show demo",
        "instance migrate demo --live",
        "instance migrate demo --cold --pre-copy --dry-run",
        "instance confirm demo --no-wait --timeout 1m",
        "instance confirm demo --dry-run --json",
        "instance revert demo --yes",
        "instance revert demo --keep-changes --no-wait",
        "migration list --instance demo --host kvm1 --active --limit 5",
        "migration show 7",
        "migration watch 7 --timeout 5",
        "migration abort 7 --wait",
        "migration force-complete 7 --no-wait",
        "migration resume 7 --dry-run",
        "doctor --json",
        "completions bash",
        "--json --config x.toml --url amqp://h node list",
    ] {
        assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
    }
}

#[test]
fn all_options_of_a_migration_arrive() {
    let migrate = migrate(
        "instance migrate demo --live --to kvm2 --post-copy --auto-converge --parallel 4 \
         --bandwidth 100 --max-downtime-ms 300 --block-migration no --progress-timeout 60 \
         --no-wait --timeout 9",
    );
    assert_eq!(migrate.to.as_ref().unwrap().as_str(), "kvm2");
    assert_eq!(
        migrate.way(None),
        Way::Live(LiveOptions {
            block_migration: BlockMigration::No,
            post_copy: true,
            auto_converge: true,
            parallel_connections: Some(4),
            bandwidth_mib_s: Some(100),
            max_downtime_ms: Some(300),
            progress_timeout_s: Some(60),
        })
    );
    assert!(migrate.change.no_wait);
    assert_eq!(migrate.patience.timeout, Some(9));
}

#[test]
fn all_options_of_a_cold_migration_arrive() {
    let migrate = migrate(
        "instance migrate demo --cold --to kvm2 --shutdown-timeout 120s --force-stop-after 2m \
         --pre-copy --bandwidth-mib-s 100 --progress-timeout 1h --vcpus 2 --memory-mib 256 \
         --timeout 3m",
    );
    let flavor = Flavor {
        vcpus: migrate.cold.vcpus.unwrap(),
        memory_mb: migrate.cold.memory_mib.unwrap(),
    };
    assert_eq!(
        migrate.way(Some(flavor)),
        Way::Cold(ColdOptions {
            shutdown_timeout_s: Some(120),
            force_stop_after_s: Some(120),
            pre_copy: true,
            bandwidth_mib_s: Some(100),
            progress_timeout_s: Some(3600),
            flavor: Some(Flavor {
                vcpus: 2,
                memory_mb: 256,
            }),
        })
    );
    assert_eq!(migrate.patience.timeout, Some(180));
}

#[test]
fn options_of_the_other_kind_are_usage_and_named() {
    for (kind, option) in [
        ("cold", "--post-copy"),
        ("cold", "--auto-converge"),
        ("cold", "--parallel 4"),
        ("cold", "--max-downtime-ms 300"),
        ("cold", "--block-migration auto"),
        ("live", "--shutdown-timeout 9"),
        ("live", "--force-stop-after 9"),
        ("live", "--pre-copy"),
        ("live", "--vcpus 2"),
        ("live", "--memory-mib 256"),
        ("live", "--cold"),
    ] {
        let line = format!("instance migrate a --{kind} {option}");
        let error = parse(&line).expect_err(&line);
        let told = error.to_string();
        assert_eq!(error.kind(), ErrorKind::ArgumentConflict, "{line}");
        let name = option.split(' ').next().unwrap();
        assert!(
            told.contains(name) && told.contains(&format!("--{kind}")),
            "{told}"
        );
    }
}

#[test]
fn a_time_is_seconds_or_has_a_unit() {
    let cases = [("90", 90), ("90s", 90), ("2m", 120), ("1h", 3600), ("0", 0)];
    for (text, expected) in cases {
        assert_eq!(seconds(text), Ok(expected), "{text}");
    }
    for text in [
        "",
        "s",
        "-1",
        "1.5",
        "2 m",
        "1d",
        "1hm",
        "99999999999999999h",
    ] {
        assert!(seconds(text).is_err(), "{text}");
    }
    assert!(some_seconds("0m").is_err());
}

#[test]
fn what_is_left_out_is_left_to_the_conductor() {
    let migrate = migrate("instance migrate demo --live");
    assert_eq!(migrate.way(None), Way::Live(LiveOptions::default()));
    assert!(migrate.to.is_none() && !migrate.change.no_wait && !migrate.change.dry_run);
}

#[test]
fn of_wait_and_no_wait_the_last_one_counts() {
    assert!(
        !migrate("instance migrate a --live --no-wait --wait")
            .change
            .no_wait
    );
    assert!(
        migrate("instance migrate a --live --wait --no-wait")
            .change
            .no_wait
    );
}

#[test]
fn misuse_is_usage() {
    let cases = [
        ("instance migrate demo", ErrorKind::MissingRequiredArgument),
        (
            "instance migrate --live",
            ErrorKind::MissingRequiredArgument,
        ),
        ("node show -- -bad", ErrorKind::ValueValidation),
        ("node show a/b", ErrorKind::ValueValidation),
        ("migration list --limit 0", ErrorKind::ValueValidation),
        ("migration watch 7 --timeout 0", ErrorKind::ValueValidation),
        (
            "instance migrate a --live --block-migration maybe",
            ErrorKind::InvalidValue,
        ),
        (
            "instance migrate a --cold --shutdown-timeout soon",
            ErrorKind::ValueValidation,
        ),
        (
            "instance migrate a --cold --vcpus 0",
            ErrorKind::ValueValidation,
        ),
        ("instance revert", ErrorKind::MissingRequiredArgument),
        ("node drain kvm1", ErrorKind::InvalidSubcommand),
        ("migration confirm 7", ErrorKind::InvalidSubcommand),
    ];
    for (line, kind) in cases {
        let error = parse(line).expect_err(line);
        assert_eq!((error.kind(), error.exit_code()), (kind, 2), "{line}");
    }
    let empty = Cli::try_parse_from(["drover", "instance", "show", " "]);
    assert_eq!(empty.unwrap_err().kind(), ErrorKind::ValueValidation);
}

#[test]
fn help_never_shows_the_password_of_the_environment() {
    let command = Cli::command();
    let url = command
        .get_arguments()
        .find(|a| a.get_id() == "url")
        .unwrap();
    assert!(url.is_hide_env_values_set());
}
