//! What an operator sees while an operation goes on.

use super::*;
use crate::samples::{self, Tape};

#[test]
fn a_display_looks_so() {
    let view = samples::drain_view();
    let mut board = Board::new();
    board.take(&view);
    let text = board.lines(&view, 20).join("\n");
    let expected = "\
draining kvm1: 1 of 4 moved, 1 moving, 1 waits, 1 stays, 1 failed  0:12
VM   PROJECT  PHASE    TARGET  %    MOVED        RATE      DIRTY    ETA    DOWNTIME  REASON
vm1  default  moved    kvm2    100  -            -         -        -      212 ms    -
vm2  default  memory   kvm2    61   0.6/1.1 GiB  90 MiB/s  4 MiB/s  1.5 s  ~120 ms   -
vm3  default  waiting  kvm2    -    -            -         -        -      ~120 ms   kvm2 takes 1 guest at a time
vm4  default  failed   -       -    -            -         -        -      -         QEMU on kvm3 died
vm5  default  stays    -       -    -            -         -        -      -         it has the host's device 0000:01:00.0";
    assert_eq!(text, expected, "\n{text}");
}

#[tokio::test(start_paused = true)]
async fn the_clock_goes_on_between_records() {
    let view = samples::drain_view();
    let mut board = Board::new();
    board.take(&view);
    tokio::time::advance(std::time::Duration::from_secs(60)).await;
    assert!(board.lines(&view, 20)[0].ends_with("  1:12"));
    let done = samples::view(samples::drained());
    board.take(&done);
    assert!(
        board.lines(&done, 20)[0].ends_with("  0:21"),
        "the record tells the end"
    );
}

#[test]
fn where_not_all_find_room_those_are_shown_that_move() {
    let view = samples::drain_view();
    let mut board = Board::new();
    board.take(&view);
    let text = board.lines(&view, 2).join("\n");
    assert!(text.contains("\nvm2") && text.contains("\nvm4"), "{text}");
    assert!(text.ends_with("\nand 3 more"), "{text}");
    assert_eq!(text.lines().count(), 5);
}

#[test]
fn a_terminal_is_redrawn_in_place_and_never_scrolls() {
    let tape = Tape::default();
    let mut screen = tape.screen(Manner::Terminal);
    let mut board = Board::new();
    let mut view = samples::drain_view();
    let item = view.operation.items[2].clone();
    view.operation.items.extend(std::iter::repeat_n(item, 100));
    board.show(&mut screen, &view).unwrap();
    board.show(&mut screen, &view).unwrap();
    let text = tape.out();
    assert_eq!(text.matches("\x1b[23A").count(), 1, "{text:?}");
    assert_eq!(
        text.lines().filter(|l| l.contains("and 85 more")).count(),
        2,
        "{text}"
    );
}

#[test]
fn what_is_shown_of_a_guest_never_runs_backwards() {
    let view = samples::drain_view();
    let mut board = Board::new();
    board.take(&view);
    let mut back = view.clone();
    back.migrations[0].progress.memory = samples::sent(1 << 20, 128 << 20);
    board.take(&back);
    let [before, after] = [&view, &back].map(|view| board.lines(view, 20)[3].clone());
    assert!(
        before.contains("61") && after.contains("61"),
        "{before}\n{after}"
    );
    back.migrations.clear();
    board.take(&back);
    assert!(board.shown.is_empty(), "what is over is not kept");
}

#[test]
fn nothing_from_the_wire_steers_the_terminal() {
    for manner in [Manner::Plain, Manner::Terminal] {
        let tape = Tape::default();
        let mut view = samples::drain_view();
        view.operation.items[2].state = ItemState::Waiting {
            why: "a\x1b]0;b\x07c".to_owned(),
        };
        view.operation.items[0].planned.name = "vm\x1b[31m".to_owned();
        Board::new().show(&mut tape.screen(manner), &view).unwrap();
        let out = tape.out();
        assert!(
            out.contains("a]0;bc") && !out.contains("\x1b[31m"),
            "{out:?}"
        );
    }
}
