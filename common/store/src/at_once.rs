//! For simulation: a database that answers at once. Whoever asks it has its whole
//! answer before anybody else of the same thread goes on, so virtual time stands
//! still meanwhile, and the same run can be had again.

use std::{
    pin::pin,
    sync::{Arc, LazyLock},
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
};

use tokio::runtime::{Builder, Runtime};

/// Carries what the database's pool does by itself.
static BESIDE: LazyLock<Runtime> = LazyLock::new(|| {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("database")
        .enable_all()
        .build();
    runtime.expect("a thread can be made")
});

struct Awake(Thread);

impl Wake for Awake {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Does that work now, and blocks this thread until it is done.
pub(crate) fn at_once<T>(work: impl Future<Output = T>) -> T {
    let _beside = BESIDE.enter();
    let mut work = pin!(tokio::task::unconstrained(work));
    let waker = Waker::from(Arc::new(Awake(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match work.as_mut().poll(&mut context) {
            Poll::Ready(done) => return done,
            Poll::Pending => thread::park(),
        }
    }
}
