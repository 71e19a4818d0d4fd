//! What holds of the record, whatever a node reports: the body of a fuzz target
//! (`tests/fuzz`). A property that does not hold is a panic.

use uuid::Uuid;

use super::*;

const NOW_MS: u64 = 1_800_000_000_000;

/// Takes a report in beside what is on record already. What becomes of an instance
/// follows from what is said of that one: one the report does not name stays as it
/// is unless it was the reporting node's, and none leaves its node or its project
/// because another node names it.
pub fn report(report: &NodeReport) {
    let HypervisorReport::Up { instances, .. } = &report.hypervisor else {
        return;
    };
    let elsewhere: HostName = match report.host.as_str() {
        "elsewhere" => "further".parse(),
        _ => "elsewhere".parse(),
    }
    .expect("a host name");
    let rows = before(report, instances, &elsewhere);
    let mut under_way = UnderWay::default();
    if let Some(first) = instances.iter().find(|seen| seen.id != InstanceId::NONE) {
        let between = vec![report.host.clone(), elsewhere.clone()];
        let changes_hands = first.vcpus % 2 == 0;
        under_way.moving.insert(
            first.id,
            Moving {
                between,
                changes_hands,
            },
        );
    }
    for change in reconcile(report, instances, &rows, &under_way, NOW_MS) {
        match change {
            Change::Keep(row) => keep(report, instances, &rows, &row),
            Change::Missing(id) | Change::Forget(id) => {
                assert_eq!(rows[&id].host, report.host, "gone by its own node's word");
                let listed = instances.iter().any(|seen| seen.id == id && !seen.incoming);
                assert!(!listed && !under_way.moving.contains_key(&id));
            }
            Change::Note(note) => assert!(!note.contains('\n') && note.len() < 4096, "{note}"),
            Change::Alarm(row) => assert!(row.other.is_some()),
        }
    }
}

/// Instances on record: some that the report lists, at home here or there, and one
/// of each node that it does not.
fn before(
    report: &NodeReport,
    instances: &[InstanceReport],
    elsewhere: &HostName,
) -> HashMap<InstanceId, InstanceRow> {
    let mut rows = HashMap::new();
    let mut put = |host: &HostName, seen: &InstanceReport, n: usize| {
        let mut row = row_of(host, seen, NOW_MS - 1000);
        // Others than the report says.
        row.project = format!("project-{n}");
        row.missing_since_ms = (n % 5 == 4).then_some(NOW_MS - 500);
        row.awaited = (n % 7 == 6)
            .then(|| report.host.clone())
            .into_iter()
            .collect();
        rows.insert(row.id, row);
    };
    for (n, seen) in instances.iter().enumerate() {
        match n % 3 {
            0 => put(elsewhere, seen, n),
            1 => put(&report.host, seen, n),
            _ => {}
        }
    }
    for (n, host) in [(0, elsewhere), (1, &report.host)] {
        let id = InstanceId(Uuid::from_u128(0x5eed_0000 + n));
        let quiet = InstanceReport::unreadable(id, "quiet", "");
        if !instances.iter().any(|seen| seen.id == id) {
            put(host, &quiet, 0);
        }
    }
    rows.remove(&InstanceId::NONE);
    rows
}

fn keep(
    report: &NodeReport,
    instances: &[InstanceReport],
    rows: &HashMap<InstanceId, InstanceRow>,
    row: &InstanceRow,
) {
    assert_ne!(row.id, InstanceId::NONE, "nobody's row");
    let listed = instances.iter().find(|seen| seen.id == row.id);
    let Some(before) = rows.get(&row.id) else {
        let listed = listed.expect("only what is listed is new");
        assert!(!listed.incoming, "one that arrives is not there yet");
        assert_eq!(row.host, report.host);
        return;
    };
    if before.host == report.host {
        return;
    }
    let follows = before.missing_since_ms.is_some() && listed.is_some();
    if !follows {
        let known = |row: &InstanceRow| {
            let row = row.clone();
            (
                row.host,
                row.project,
                row.generation,
                row.power_state,
                row.missing_since_ms,
            )
        };
        assert_eq!(known(row), known(before), "another node's word moved it");
    }
    let awaited = before.awaited.contains(&report.host);
    assert!(
        listed.is_some() || awaited,
        "a report that does not name it changed it"
    );
}
