//! Torture in every test run: the same ten cases each time. `devstack/torture` has
//! others.

use drover_store::scratch::postgresql_url;
use drover_tests::{
    devstack::Devstack,
    torture::{Asked, run},
};

/// The cases of every run.
const CASES: Asked = Asked {
    seed: 12,
    from: 0,
    cases: 10,
};

#[test]
fn nothing_is_lost_whatever_dies_or_stands_still() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let database = runtime.block_on(postgresql_url());
    let Some((devstack, database)) = Devstack::take_three().zip(database) else {
        return;
    };
    let ran = run(&devstack, &database, CASES).expect("the devstack can be made ready");
    assert!(ran.failed.is_empty(), "{}", ran.failed.join("\n"));
}
