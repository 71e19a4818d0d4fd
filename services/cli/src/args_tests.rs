//! What a command line is taken for.

use clap::{CommandFactory, error::ErrorKind};
use drover_model::{
    api::conductor::ProjectChange,
    migration::{TransferMode, TransferOptions},
    project::{Limit, Project},
};
use serde_json::json;

use super::{operation::OperationVerb, project::ProjectVerb, *};

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
        "node drain kvm1",
        "node drain kvm1 --mixed --to kvm2,kvm3 --max-parallel 2 --reason disks --dry-run --json",
        "node drain kvm1 --cold --force-stop-after 2m --no-wait --timeout 1h",
        "node restore kvm1 --none",
        "node restore kvm1 --only vm1 --only vm2 --live --max-parallel 2 --dry-run",
        "node evacuate kvm1 --to kvm2 --only vm1,vm2 --i-confirm-host-is-off --despite-many-lost",
        "node evacuate kvm1 --despite agent-answers,libvirt-reachable --despite host-responds",
        "node force-down kvm1 --unset --dry-run",
        "node forget kvm1 --dry-run",
        "node balance --threshold 10 --max-moves 5 --max-parallel 2 --dry-run",
        "node automation --evacuate off --balance on",
        "operation list --host kvm1 --kind drain --active --limit 5",
        "operation show 4 --json",
        "operation watch 4 --timeout 5m",
        "operation cancel 4 --no-wait",
        "operation cancel 4 --dry-run",
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
        "instance transfer demo --project blue --live --network br0=lan --keep-disk --title T",
        "instance transfer demo --project blue --cold --new-mac --name new --dry-run --no-wait",
        "transfer offer demo",
        "transfer offer demo --project blue --expires 3d --dry-run --json",
        "transfer accept 0199 --project blue --live",
        "transfer accept 0199 --project blue --key k --cold --shutdown-timeout 1m --timeout 5m",
        "transfer list --project blue --all",
        "transfer show 0199",
        "transfer withdraw 0199 --dry-run",
        "project list --json",
        "project show blue",
        "project create blue --disabled --dry-run",
        "project set blue --enable --remove-network lan --no-storage",
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
            ..Default::default()
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
            ..Default::default()
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
    assert_eq!(
        (long_seconds("2h"), long_seconds("3d")),
        (Ok(7200), Ok(259_200))
    );
    for text in ["0", "0d", "d", "1.5d", "-1d", "213503982334602d"] {
        assert!(long_seconds(text).is_err(), "{text}");
    }
}

fn handover(options: &str) -> Result<TransferOptions, String> {
    let line = format!("instance transfer demo --project blue {options}");
    match parse(&line).unwrap().noun {
        Noun::Instance(InstanceVerb::Transfer(order)) => order.how.options(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_options_of_a_transfer_arrive() {
    let cold = handover(
        "--cold --network br0=lan --network 52:54:00:00:00:01=wan --keep-disk --new-mac --name new \
         --title T --shutdown-timeout 2m --force-stop-after 3m --bandwidth 100 --progress-timeout 60",
    );
    let networks = [("br0", "lan"), ("52:54:00:00:00:01", "wan")];
    let networks = networks.map(|(old, new)| (old.to_owned(), new.to_owned()));
    let expected = TransferOptions {
        mode: TransferMode::Cold,
        networks: networks.into(),
        keep_disk: true,
        new_mac: true,
        name: Some("new".to_owned()),
        title: Some("T".to_owned()),
        shutdown_timeout_s: Some(120),
        force_stop_after_s: Some(180),
        bandwidth_mib_s: Some(100),
        progress_timeout_s: Some(60),
        ..Default::default()
    };
    assert_eq!(cold, Ok(expected));
    assert_eq!(handover("--live"), Ok(TransferOptions::default()));
}

#[test]
fn what_no_running_guest_can_be_given_is_refused_with_the_reason() {
    for (options, why) in [
        ("--live --name new", "libvirt renames no running domain"),
        ("--live --new-mac", "a running NIC keeps its MAC address"),
        (
            "--live --network a=b --network a=c",
            "network a is replaced twice",
        ),
        (
            "--cold --name a/b",
            "name is 1 to 255 characters without '/'",
        ),
        ("--live --bandwidth 0", "bandwidth_mib_s is 0"),
    ] {
        let words = handover(options).expect_err(options);
        assert!(words.contains(why), "{words}");
    }
}

fn created(options: &str) -> Result<Project, String> {
    match parse(&format!("project create blue {options}"))
        .unwrap()
        .noun
    {
        Noun::Project(ProjectVerb::Create(order)) => order.project(),
        other => panic!("{other:?}"),
    }
}

fn wished(options: &str) -> Result<ProjectChange, String> {
    match parse(&format!("project set blue {options}")).unwrap().noun {
        Noun::Project(ProjectVerb::Set(order)) => order.wished(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_project_is_made_as_it_is_said() {
    let project = created(
        "--name Blue --instances 10 --vcpus unlimited --memory-mib 4096 --disk-gib 50 --disabled \
         --network lan=bridge:br-blue@kvm1,kvm2 --network lan=network:blue \
         --network wan=bridge:br-wan --storage directory:/srv/a@b/c --storage pool:blue@kvm2",
    );
    let expected = json!({
        "id": "blue", "name": "Blue", "enabled": false,
        "quota": {"instances": 10, "vcpus": -1, "memory_mb": 4096, "disk_gb": 50},
        "networks": {
            "lan": [
                {"nodes": ["kvm1", "kvm2"], "attachment": {"type": "bridge", "bridge": "br-blue"}},
                {"nodes": [], "attachment": {"type": "network", "network": "blue"}},
            ],
            "wan": [{"nodes": [], "attachment": {"type": "bridge", "bridge": "br-wan"}}],
        },
        "storage": [
            {"nodes": [], "location": {"type": "directory", "path": "/srv/a@b/c"}},
            {"nodes": ["kvm2"], "location": {"type": "pool", "pool": "blue"}},
        ],
    });
    assert_eq!(serde_json::to_value(project.unwrap()).unwrap(), expected);
    assert_eq!(created(""), Ok(Project::new("blue".parse().unwrap())));
}

#[test]
fn of_a_project_only_what_is_said_changes() {
    let change =
        wished("--disable --vcpus 4 --remove-network lan --network wan=bridge:b --no-storage");
    let change = change.unwrap();
    assert_eq!(change.enabled, Some(false));
    assert_eq!(
        (change.vcpus, change.memory_mb),
        (Some(Limit::AtMost(4)), None)
    );
    assert_eq!(change.networks["lan"], []);
    assert_eq!(change.networks["wan"].len(), 1);
    assert_eq!(change.storage, Some(Vec::new()));
    let change = wished("--enable").unwrap();
    assert_eq!((change.enabled, change.storage), (Some(true), None));
}

#[test]
fn what_cannot_be_of_a_project_is_named() {
    for (options, why) in [
        (
            "--network lan=bridge:a --network lan=bridge:b",
            "network lan: said twice for all nodes",
        ),
        (
            "--network lan=bridge:a@kvm1 --network lan=bridge:b@kvm2,kvm1",
            "network lan: said twice for kvm1",
        ),
        ("--network lan=bridge:", "'' is no name of a bridge"),
        (
            "--storage directory:srv",
            "'srv' is no absolute, plain path",
        ),
        (
            "--storage pool:a --storage pool:b",
            "storage: said twice for all nodes",
        ),
    ] {
        for words in [created(options).err(), wished(options).err()] {
            let words = words.expect(options);
            assert!(words.contains(why), "{words}");
        }
    }
    assert_eq!(wished(""), Err("nothing is to change".to_owned()));
    let both = wished("--network lan=bridge:a --remove-network lan");
    assert_eq!(both, Err("network lan is both set and removed".to_owned()));
}

fn node(line: &str) -> NodeVerb {
    match parse(&format!("node {line}")).unwrap().noun {
        Noun::Node(verb) => verb,
        other => panic!("{other:?}"),
    }
}

fn drain(options: &str) -> Result<serde_json::Value, String> {
    match node(&format!("drain kvm1 {options}")) {
        NodeVerb::Drain(order) => {
            let options = order.options()?;
            Ok(serde_json::to_value(options).unwrap())
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_drain_is_as_it_is_said() {
    let all = drain(
        "--mixed --to kvm2,kvm3 --to kvm4 --max-parallel 2 --reason disks --post-copy \
         --bandwidth 100 --progress-timeout 1m --shutdown-timeout 2m --force-stop-after 3m",
    )
    .unwrap();
    assert_eq!(all["mode"], "mixed");
    assert_eq!(all["to"], json!(["kvm2", "kvm3", "kvm4"]));
    assert_eq!(
        (&all["max_parallel"], &all["reason"]),
        (&json!(2), &json!("disks"))
    );
    assert_eq!(all["live"]["post_copy"], true);
    assert_eq!(all["cold"]["force_stop_after_s"], 180);
    for way in ["live", "cold"] {
        assert_eq!(all[way]["bandwidth_mib_s"], 100, "{way}");
        assert_eq!(all[way]["progress_timeout_s"], 60, "{way}");
    }
    let none = drain("").unwrap();
    assert_eq!((&none["mode"], &none["to"]), (&json!("live"), &json!([])));
}

#[test]
fn no_guest_is_stopped_by_a_drain_that_does_not_say_so() {
    for option in ["--force-stop-after 9", "--shutdown-timeout 9", "--pre-copy"] {
        let words = drain(option).expect_err(option);
        assert!(
            words.ends_with("is of no use without --cold or --mixed"),
            "{words}"
        );
        assert!(drain(&format!("--mixed {option}")).is_ok());
    }
    let words = drain("--to kvm2,kvm1").unwrap_err();
    assert_eq!(words, "kvm1 cannot be emptied to kvm1 itself");
    assert!(
        drain("--parallel 1")
            .unwrap_err()
            .contains("parallel_connections is 1")
    );
}

#[test]
fn what_comes_back_is_as_it_is_said() {
    let cases = [
        ("", json!("all")),
        ("--all", json!("all")),
        ("--none", json!("none")),
        ("--only a,b --only c", json!({"only": ["a", "b", "c"]})),
    ];
    for (options, returning) in cases {
        let NodeVerb::Restore(order) = node(&format!("restore kvm1 {options}")) else {
            panic!("{options}");
        };
        let options = serde_json::to_value(order.options()).unwrap();
        assert_eq!(options["returning"], returning);
        assert_eq!(options["mode"], "live");
    }
}

#[test]
fn an_evacuation_confirms_nothing_by_itself() {
    for (options, confirmed, despite) in [
        ("", false, false),
        ("--i-confirm-host-is-off", true, false),
        ("--despite-many-lost", false, true),
    ] {
        let NodeVerb::Evacuate(order) = node(&format!("evacuate kvm1 {options}")) else {
            panic!("{options}");
        };
        let options = order.options(Vec::new());
        assert_eq!(
            (options.confirmed_off, options.despite_many_lost),
            (confirmed, despite)
        );
    }
    let NodeVerb::Automation(order) = node("automation --evacuate off") else {
        panic!("not automation");
    };
    let request = order.request();
    assert_eq!((request.evacuate, request.balance), (Some(false), None));
    let cancel = parse("operation cancel 4").unwrap().noun;
    assert!(matches!(
        cancel,
        Noun::Operation(OperationVerb::Cancel { .. })
    ));
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
        (
            "instance transfer demo --project blue",
            ErrorKind::MissingRequiredArgument,
        ),
        (
            "instance transfer demo --live",
            ErrorKind::MissingRequiredArgument,
        ),
        (
            "instance transfer demo --project blue --live --cold",
            ErrorKind::ArgumentConflict,
        ),
        (
            "instance transfer demo --project blue --live --force-stop-after 9",
            ErrorKind::ArgumentConflict,
        ),
        (
            "instance transfer demo --project blue --live --network lan",
            ErrorKind::ValueValidation,
        ),
        (
            "transfer accept 0199 --live",
            ErrorKind::MissingRequiredArgument,
        ),
        (
            "transfer offer demo --expires 0d",
            ErrorKind::ValueValidation,
        ),
        ("project create blue --vcpus -1", ErrorKind::UnknownArgument),
        ("project create blue --vcpus=-1", ErrorKind::ValueValidation),
        (
            "project create blue --network lan",
            ErrorKind::ValueValidation,
        ),
        (
            "project create blue --network lan=tap:x",
            ErrorKind::ValueValidation,
        ),
        (
            "project create blue --network lan=bridge:x@",
            ErrorKind::ValueValidation,
        ),
        (
            "project create blue --storage /srv",
            ErrorKind::ValueValidation,
        ),
        (
            "project set blue --enable --disable",
            ErrorKind::ArgumentConflict,
        ),
        (
            "project set blue --storage pool:a --no-storage",
            ErrorKind::ArgumentConflict,
        ),
        ("node drain", ErrorKind::MissingRequiredArgument),
        (
            "node drain kvm1 --live --mixed",
            ErrorKind::ArgumentConflict,
        ),
        (
            "node drain kvm1 --cold --post-copy",
            ErrorKind::ArgumentConflict,
        ),
        (
            "node drain kvm1 --live --force-stop-after 9",
            ErrorKind::ArgumentConflict,
        ),
        (
            "node drain kvm1 --max-parallel 0",
            ErrorKind::ValueValidation,
        ),
        (
            "node restore kvm1 --all --none",
            ErrorKind::ArgumentConflict,
        ),
        ("node balance --threshold 101", ErrorKind::ValueValidation),
        ("node automation --evacuate maybe", ErrorKind::InvalidValue),
        (
            "node evacuate kvm1 --despite everything",
            ErrorKind::InvalidValue,
        ),
        ("operation list --kind move", ErrorKind::InvalidValue),
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
