//! What can be made to go wrong, and when.

use std::time::Duration;

use super::super::HypervisorError;

/// A call of the driver, to be named by a script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Call {
    /// `inventory`
    Inventory,
    /// `guests`
    Guests,
    /// `guest`
    Guest,
    /// `presence`
    Presence,
    /// `leave_marks`
    LeaveMarks,
    /// `remove_marks`
    RemoveMarks,
    /// `answer_destination`
    AnswerDestination,
    /// `contents`
    Contents,
    /// `digests`
    Digests,
    /// `addresses`
    Addresses,
    /// `create_disk`
    CreateDisk,
    /// `remove_disk`
    RemoveDisk,
    /// `migrate`
    Migrate,
    /// `job`
    Job,
    /// `completed_job`
    CompletedJob,
    /// `abort`
    Abort,
    /// `sever`
    Sever,
    /// `start_post_copy`
    StartPostCopy,
    /// `pause_for_switch_over`
    PauseForSwitchOver,
    /// `resume`
    Resume,
    /// `set_max_downtime_ms`
    SetMaxDowntime,
    /// `discard_incoming`
    DiscardIncoming,
    /// `discard_outgoing`
    DiscardOutgoing,
    /// `discard_half`
    DiscardHalf,
    /// `freeze_disks`
    FreezeDisks,
    /// `thaw_disks`
    ThawDisks,
    /// `merge_overlay`
    MergeOverlay,
    /// `undefine`
    Undefine,
    /// `lasting_guest`
    LastingGuest,
    /// `shut_down`
    ShutDown,
    /// `stop`
    Stop,
    /// `start`
    Start,
    /// `is_going_off`
    IsGoingOff,
    /// `definition`
    Definition,
    /// `define`
    Define,
    /// `withdraw`
    Withdraw,
    /// `file_facts`
    FileFacts,
    /// `reserve_file`
    ReserveFile,
    /// `rename_file`
    RenameFile,
    /// `flush_file`
    FlushFile,
    /// `disk_port`, which takes no time: no effect but `Refuse` and `Forget`.
    DiskPort,
    /// `receive`
    Receive,
    /// `stop_receiving`, which cannot tell: `Refuse` leaves it undone in silence.
    StopReceiving,
    /// `send`
    Send,
    /// `networks_present`
    NetworksPresent,
    /// `location_facts`
    LocationFacts,
    /// `other_users`
    OtherUsers,
    /// `standing`
    Standing,
    /// `hand_over`
    HandOver,
    /// `hand_back`
    HandBack,
    /// `mirror_disk`
    MirrorDisk,
    /// `pivot_disk`
    PivotDisk,
    /// `abandon_mirror`
    AbandonMirror,
    /// `place_disk`
    PlaceDisk,
    /// `kept_definition`
    KeptDefinition,
    /// `storage_facts`
    StorageFacts,
    /// `define_rebuilt`
    DefineRebuilt,
    /// `dirty_rate`
    DirtyRate,
    /// `unguarded_autostarts`
    UnguardedAutostarts,
    /// `take_over_autostart`
    TakeOverAutostart,
}

impl Call {
    /// Whether it asks libvirt, or only the node's file system.
    pub(super) fn asks_libvirt(self) -> bool {
        !matches!(
            self,
            Self::LeaveMarks
                | Self::RemoveMarks
                | Self::FlushFile
                | Self::DiskPort
                | Self::Receive
                | Self::StopReceiving
                | Self::Send
                | Self::PlaceDisk
                | Self::Sever
                | Self::StorageFacts
        )
    }
}

/// What happens to a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// It is refused with this, and nothing is done.
    Refuse(HypervisorError),
    /// It is done, and the caller is told this all the same. (`migrate`: the
    /// migration begins, and goes on.)
    Forget(HypervisorError),
    /// It takes so long before it is done.
    SlowBefore(Duration),
    /// It is done, and the caller hears of it so much later.
    SlowAfter(Duration),
    /// The caller dies of it, as of a mistake of its own.
    Panic,
}

/// A call that will not go well.
#[derive(Debug, Clone)]
pub(super) struct CallScript {
    /// Which.
    pub(super) call: Call,
    /// How.
    pub(super) effect: Effect,
    /// How often from now on.
    pub(super) times: u32,
}

/// A point of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// The destination waits for it; nothing was sent.
    Start,
    /// So many percent of the disks are copied.
    Disk(u8),
    /// So many percent of the first round over memory are sent.
    Memory(u8),
    /// This round over memory begins (the first is 1).
    Round(u64),
    /// The guest stands still and changes sides.
    SwitchOver,
    /// The guest runs on the destination; so many percent of what was left
    /// are there.
    PostCopy(u8),
    /// The guest runs on the destination with all its memory, and the source
    /// does not know yet.
    Finish,
}

/// One end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where the guest comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// What goes wrong with a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// It stands still until [`super::Fabric::unstall`].
    Stall,
    /// It fails with these words; the guest runs on where it was.
    Fail(String),
    /// That end's QEMU dies. At the source, and at the destination once the
    /// guest runs there, the guest dies with it.
    QemuDies(End),
    /// The link between the two is cut.
    CutLink,
    /// That end's libvirtd answers no caller; what it does goes on.
    LibvirtdAway(End),
    /// That end's libvirtd dies, and what it was doing with it.
    LibvirtdDies(End),
    /// That end's node loses power.
    PowerOff(End),
    /// The caller of `migrate` is told `Lost`; the migration goes on.
    LoseCaller,
    /// The caller of `migrate` hears of its end so much later.
    ReportLate(Duration),
    /// If it fails, the destination's QEMU goes on waiting.
    LeaveIncoming,
    /// If it fails, the source's guest stays paused.
    LeavePaused,
    /// The move succeeds, and the source is never told: its copy stays there,
    /// paused, with old memory. (What libvirt leaves when its daemon dies
    /// between the destination's start and the source's clean-up.)
    LeaveStaleCopy,
    /// The move succeeds, and the source keeps a definition that is shut off.
    KeepDefinition,
}

/// A fault and its moment.
#[derive(Debug, Clone)]
pub(super) struct MigrationScript {
    /// When.
    pub(super) at: At,
    /// What.
    pub(super) fault: Fault,
}

/// A fault of files being sent, and its moment.
#[derive(Debug, Clone)]
pub(super) struct SendScript {
    /// So many percent of their bytes are there.
    pub(super) percent: u8,
    /// What.
    pub(super) fault: Fault,
}
