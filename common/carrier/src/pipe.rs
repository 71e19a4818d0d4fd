//! A bounded queue between one thread that fills it and one that empties it.
//! Bounded by weight (bytes), so that small things do not wait for large ones.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex},
    time::{Duration, Instant},
};

use crate::sync::{locked, wait};

/// What each thing weighs besides its bytes: bounds the number of small ones.
const AT_LEAST: usize = 16 * 1024;

/// The queue.
pub(crate) struct Pipe<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
    room: usize,
}

struct State<T> {
    queue: VecDeque<(T, usize)>,
    weight: usize,
    closed: bool,
}

/// What came of an attempt to add.
pub(crate) enum Push<T> {
    /// It is in.
    Done,
    /// Still no room; here it is again.
    Full(T),
    /// Nobody will take it.
    Closed,
}

/// What came of an attempt to take.
pub(crate) enum Pop<T> {
    /// The oldest one.
    Item(T),
    /// Still nothing.
    Empty,
    /// Nothing, ever again.
    Closed,
}

impl<T> Pipe<T> {
    /// An empty one that holds so many bytes.
    pub(crate) fn new(room: usize) -> Self {
        let state = State {
            queue: VecDeque::new(),
            weight: 0,
            closed: false,
        };
        Self {
            state: Mutex::new(state),
            changed: Condvar::new(),
            room,
        }
    }

    /// Adds, waiting at most so long for room. An empty pipe takes anything.
    pub(crate) fn push(&self, item: T, bytes: usize, patience: Duration) -> Push<T> {
        let weight = bytes + AT_LEAST;
        let until = Instant::now() + patience;
        let mut state = locked(&self.state);
        loop {
            if state.closed {
                return Push::Closed;
            }
            if state.queue.is_empty() || state.weight + weight <= self.room {
                state.weight += weight;
                state.queue.push_back((item, weight));
                self.changed.notify_one();
                return Push::Done;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Push::Full(item);
            }
            state = wait(&self.changed, state, left);
        }
    }

    /// Takes the oldest, waiting at most so long for one.
    pub(crate) fn pop(&self, patience: Duration) -> Pop<T> {
        let until = Instant::now() + patience;
        let mut state = locked(&self.state);
        loop {
            if let Some((item, weight)) = state.queue.pop_front() {
                state.weight -= weight;
                self.changed.notify_one();
                return Pop::Item(item);
            }
            if state.closed {
                return Pop::Closed;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Pop::Empty;
            }
            state = wait(&self.changed, state, left);
        }
    }

    /// Throws away what is in; nothing goes in any more.
    pub(crate) fn abandon(&self) {
        let mut state = locked(&self.state);
        state.closed = true;
        state.weight = 0;
        state.queue.clear();
        self.changed.notify_all();
    }
}
