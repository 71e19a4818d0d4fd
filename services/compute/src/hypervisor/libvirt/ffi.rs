//! Every call into C that the `virt` crate lacks, or makes in a way that leaks
//! or panics: jobs, post-copy, migration with typed parameters, events, the
//! close callback, block jobs, CPU comparison, and what is asked of the operating
//! system. This file and what is below it alone hold `unsafe` code; what they
//! offer is safe.
#![allow(unsafe_code)]

pub(super) mod stats;

use std::{
    collections::BTreeMap,
    ffi::{CStr, CString, c_int, c_uint, c_void},
    fs::File,
    mem::MaybeUninit,
    os::fd::AsRawFd,
    path::Path,
    ptr,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
};

use drover_model::ids::InstanceId;
use tokio::sync::{Notify, broadcast};
use uuid::Uuid;
use virt::{connect::Connect, domain::Domain, error::Error, sys};

use crate::hypervisor::Event;

type VirtResult<T> = std::result::Result<T, Error>;

fn checked(ret: c_int) -> VirtResult<c_int> {
    if ret < 0 {
        Err(Error::last_error())
    } else {
        Ok(ret)
    }
}

/// State and reason of a domain, as libvirt's numbers.
pub(super) fn domain_state(domain: &Domain) -> VirtResult<(c_uint, c_uint)> {
    let (mut state, mut reason): (c_int, c_int) = (0, 0);
    // SAFETY: `domain` keeps its pointer valid; both outputs live on this stack.
    checked(unsafe { sys::virDomainGetState(domain.as_ptr(), &mut state, &mut reason, 0) })?;
    Ok((state.unsigned_abs(), reason.unsigned_abs()))
}

/// A number or text of a typed parameter.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Any integer type and booleans.
    Number(i128),
    /// A text.
    Text(String),
    /// A kind that nothing here reads (floating point, or one yet unknown).
    Unread,
}

/// Typed parameters by name.
pub(super) type Values = BTreeMap<String, Value>;

/// A typed-parameter array that libvirt allocates and we own.
struct ParamArray {
    items: sys::virTypedParameterPtr,
    count: c_int,
    room: c_int,
}

impl ParamArray {
    fn new() -> Self {
        Self {
            items: ptr::null_mut(),
            count: 0,
            room: 0,
        }
    }

    fn add(&mut self, name: &CStr, value: &Param) -> VirtResult<()> {
        // SAFETY: the three fields are what libvirt left there (or the empty
        // array); it grows the array itself and copies name and value.
        let ret = unsafe {
            let (items, count, room) = (&mut self.items, &mut self.count, &mut self.room);
            match value {
                Param::Int(v) => sys::virTypedParamsAddInt(items, count, room, name.as_ptr(), *v),
                Param::ULong(v) => {
                    sys::virTypedParamsAddULLong(items, count, room, name.as_ptr(), *v)
                }
                Param::Text(v) => {
                    sys::virTypedParamsAddString(items, count, room, name.as_ptr(), v.as_ptr())
                }
            }
        };
        checked(ret).map(drop)
    }

    fn read(&self) -> Values {
        // SAFETY: libvirt gave `count` initialised entries at `items`, which
        // stay until `drop`.
        unsafe { read_params(self.items, self.count) }
    }
}

/// Reads an array of typed parameters.
///
/// # Safety
/// `items` is null or points at `count` initialised entries.
unsafe fn read_params(items: sys::virTypedParameterPtr, count: c_int) -> Values {
    let len = usize::try_from(count).unwrap_or(0);
    if items.is_null() || len == 0 {
        return Values::new();
    }
    // SAFETY: the caller's promise.
    let items = unsafe { std::slice::from_raw_parts(items, len) };
    items.iter().map(read_param).collect()
}

impl Drop for ParamArray {
    fn drop(&mut self) {
        // SAFETY: array and strings in it come from libvirt's allocator; freed once.
        unsafe { sys::virTypedParamsFree(self.items, self.count) };
    }
}

fn read_param(param: &sys::virTypedParameter) -> (String, Value) {
    // SAFETY: libvirt ends names with NUL within their 80 bytes.
    let name = unsafe { CStr::from_ptr(param.field.as_ptr()) };
    let kind = c_uint::try_from(param.type_).unwrap_or(0);
    // SAFETY: the type tag says which member of the union was written.
    let value = unsafe {
        match kind {
            sys::VIR_TYPED_PARAM_INT => Value::Number(param.value.i.into()),
            sys::VIR_TYPED_PARAM_UINT => Value::Number(param.value.ui.into()),
            sys::VIR_TYPED_PARAM_LLONG => Value::Number(param.value.l.into()),
            sys::VIR_TYPED_PARAM_ULLONG => Value::Number(param.value.ul.into()),
            sys::VIR_TYPED_PARAM_BOOLEAN => Value::Number((param.value.b != 0).into()),
            sys::VIR_TYPED_PARAM_STRING if !param.value.s.is_null() => {
                Value::Text(CStr::from_ptr(param.value.s).to_string_lossy().into_owned())
            }
            _ => Value::Unread,
        }
    };
    (name.to_string_lossy().into_owned(), value)
}

/// A parameter for libvirt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Param {
    /// `int`.
    Int(c_int),
    /// `unsigned long long`.
    ULong(u64),
    /// A string.
    Text(CString),
}

/// Type (`VIR_DOMAIN_JOB_…`) and statistics of a domain's job; `flags` are
/// `VIR_DOMAIN_JOB_STATS_…`.
pub(super) fn job_stats(domain: &Domain, flags: c_uint) -> VirtResult<(c_uint, Values)> {
    let mut array = ParamArray::new();
    let mut kind: c_int = 0;
    // SAFETY: outputs live on this stack; the array passes to `ParamArray`,
    // which frees it.
    checked(unsafe {
        sys::virDomainGetJobStats(
            domain.as_ptr(),
            &mut kind,
            &mut array.items,
            &mut array.count,
            flags,
        )
    })?;
    Ok((kind.unsigned_abs(), array.read()))
}

/// Aborts the job on a domain.
pub(super) fn abort_job(domain: &Domain) -> VirtResult<()> {
    // SAFETY: `domain` keeps its pointer valid.
    checked(unsafe { sys::virDomainAbortJob(domain.as_ptr()) }).map(drop)
}

/// Switches an outgoing migration to post-copy.
pub(super) fn start_post_copy(domain: &Domain) -> VirtResult<()> {
    // SAFETY: `domain` keeps its pointer valid.
    checked(unsafe { sys::virDomainMigrateStartPostCopy(domain.as_ptr(), 0) }).map(drop)
}

/// Downtime that a migration of the domain may take, ms.
pub(super) fn max_downtime_ms(domain: &Domain) -> VirtResult<u64> {
    let mut downtime = 0;
    // SAFETY: `domain` keeps its pointer valid; the output lives on this stack.
    checked(unsafe { sys::virDomainMigrateGetMaxDowntime(domain.as_ptr(), &mut downtime, 0) })?;
    Ok(downtime)
}

/// Migrates a domain and returns when that is over.
pub(super) fn migrate(
    domain: &Domain,
    dest_uri: &CStr,
    params: &[(&CStr, Param)],
    flags: c_uint,
) -> VirtResult<()> {
    let mut array = ParamArray::new();
    for (name, value) in params {
        array.add(name, value)?;
    }
    // SAFETY: all pointers stay valid for the call, which copies what it keeps.
    checked(unsafe {
        sys::virDomainMigrateToURI3(
            domain.as_ptr(),
            dest_uri.as_ptr(),
            array.items,
            array.count.unsigned_abs(),
            flags,
        )
    })
    .map(drop)
}

/// Begins to merge a disk's active image into one below it, with the guest running.
pub(super) fn block_commit(domain: &Domain, disk: &CStr, base: &CStr) -> VirtResult<()> {
    // SAFETY: all pointers stay valid for the call; no top is the active image.
    checked(unsafe {
        sys::virDomainBlockCommit(
            domain.as_ptr(),
            disk.as_ptr(),
            base.as_ptr(),
            ptr::null(),
            0,
            sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE,
        )
    })
    .map(drop)
}

/// How far the job on a disk is: done so far, and in all. None if there is none.
pub(super) fn block_job(domain: &Domain, disk: &CStr) -> VirtResult<Option<(u64, u64)>> {
    // SAFETY: all-zero is a valid structure of numbers.
    let mut info: sys::virDomainBlockJobInfo = unsafe { std::mem::zeroed() };
    // SAFETY: all pointers stay valid for the call, which only writes into `info`.
    let found = checked(unsafe {
        sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &mut info, 0)
    })?;
    Ok((found > 0).then_some((info.cur, info.end)))
}

/// Ends such a merge: the guest goes on with the image below.
pub(super) fn block_pivot(domain: &Domain, disk: &CStr) -> VirtResult<()> {
    let flags = sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT;
    // SAFETY: all pointers stay valid for the call.
    checked(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags) }).map(drop)
}

/// Ends such a merge or copy: the guest goes on with the image it has.
pub(super) fn block_abort(domain: &Domain, disk: &CStr) -> VirtResult<()> {
    // SAFETY: all pointers stay valid for the call.
    checked(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), 0) }).map(drop)
}

/// Begins to copy a disk to the file of `target` (a `<disk>`), with the guest
/// running. `flags` are `VIR_DOMAIN_BLOCK_COPY_…`; no bandwidth is no limit.
pub(super) fn block_copy(
    domain: &Domain,
    disk: &CStr,
    target: &CStr,
    bandwidth_bytes_s: Option<u64>,
    flags: c_uint,
) -> VirtResult<()> {
    let mut array = ParamArray::new();
    if let Some(bandwidth) = bandwidth_bytes_s {
        let name = sys::VIR_DOMAIN_BLOCK_COPY_BANDWIDTH;
        array.add(name, &Param::ULong(bandwidth))?;
    }
    // SAFETY: all pointers stay valid for the call, which copies what it keeps.
    checked(unsafe {
        sys::virDomainBlockCopy(
            domain.as_ptr(),
            disk.as_ptr(),
            target.as_ptr(),
            array.items,
            array.count,
            flags,
        )
    })
    .map(drop)
}

/// What a CPU is compared with: an emulator of the node and how it would run.
#[derive(Debug, Clone, Copy)]
pub(super) struct CpuQuestion<'a> {
    /// Path of the emulator.
    pub(super) emulator: &'a CStr,
    /// Architecture.
    pub(super) arch: &'a CStr,
    /// Machine type.
    pub(super) machine: &'a CStr,
    /// `kvm`, ….
    pub(super) virt_type: &'a CStr,
    /// The guest's `<cpu>`.
    pub(super) cpu_xml: &'a CStr,
}

/// Whether the node's hypervisor can provide a CPU. What is missing comes as
/// an error with code `CpuIncompatible`.
pub(super) fn compare_cpu(connect: &Connect, question: CpuQuestion<'_>) -> VirtResult<bool> {
    // SAFETY: all pointers stay valid for the call.
    let ret = checked(unsafe {
        sys::virConnectCompareHypervisorCPU(
            connect.as_ptr(),
            question.emulator.as_ptr(),
            question.arch.as_ptr(),
            question.machine.as_ptr(),
            question.virt_type.as_ptr(),
            question.cpu_xml.as_ptr(),
            sys::VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE,
        )
    })?;
    Ok(ret.unsigned_abs() > 0)
}

/// Rings when a connection closes, and says why.
#[derive(Debug, Default)]
pub(super) struct Lost {
    /// Rings once.
    pub(super) bell: Notify,
    reason: AtomicI32,
}

impl Lost {
    /// Why it closed, in words.
    pub(super) fn reason(&self) -> &'static str {
        match self.reason.load(Ordering::Acquire).unsigned_abs() {
            sys::VIR_CONNECT_CLOSE_REASON_EOF => "libvirtd went away",
            sys::VIR_CONNECT_CLOSE_REASON_KEEPALIVE => "libvirtd no longer gives signs of life",
            _ => "the connection broke",
        }
    }
}

/// Callbacks registered on a connection. They hold a reference to it inside
/// libvirt, so they must be deregistered or the connection never goes away.
#[derive(Debug)]
pub(super) struct Callbacks {
    domain_events: Vec<c_int>,
    close: bool,
}

/// Registers for what happens to domains. Repeats it on `events`.
pub(super) fn listen(
    connect: &Connect,
    events: &broadcast::Sender<Event>,
    lost: &Arc<Lost>,
) -> VirtResult<Callbacks> {
    let mut callbacks = Callbacks {
        domain_events: Vec::new(),
        close: false,
    };
    let result = listen_to_all(connect, events, lost, &mut callbacks);
    match result {
        Ok(()) => Ok(callbacks),
        Err(error) => {
            stop_listening(connect, &callbacks);
            Err(error)
        }
    }
}

fn listen_to_all(
    connect: &Connect,
    events: &broadcast::Sender<Event>,
    lost: &Arc<Lost>,
    callbacks: &mut Callbacks,
) -> VirtResult<()> {
    listen_for_close(connect, lost)?;
    callbacks.close = true;
    // SAFETY: libvirt calls each function with the signature its event id
    // stands for and casts it back before it does; a function pointer's type
    // does not change its representation.
    let wanted: [(c_uint, sys::virConnectDomainEventGenericCallback); 4] = unsafe {
        [
            (
                sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                Some(std::mem::transmute::<*const c_void, GenericCallback>(
                    on_lifecycle as *const c_void,
                )),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
                Some(std::mem::transmute::<*const c_void, GenericCallback>(
                    on_metadata as *const c_void,
                )),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_MIGRATION_ITERATION,
                Some(std::mem::transmute::<*const c_void, GenericCallback>(
                    on_iteration as *const c_void,
                )),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED,
                Some(std::mem::transmute::<*const c_void, GenericCallback>(
                    on_job_completed as *const c_void,
                )),
            ),
        ]
    };
    for (id, callback) in wanted {
        let opaque = Box::into_raw(Box::new(events.clone())).cast::<c_void>();
        // SAFETY: `opaque` is a boxed sender of the type that every callback
        // and `free_sender` cast it back to; libvirt frees it by `free_sender`.
        let ret = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connect.as_ptr(),
                ptr::null_mut(),
                id.cast_signed(),
                callback,
                opaque,
                Some(free_sender),
            )
        };
        if ret < 0 {
            let error = Error::last_error();
            // SAFETY: a failed registration has not taken the box over.
            unsafe { free_sender(opaque) };
            return Err(error);
        }
        callbacks.domain_events.push(ret);
    }
    Ok(())
}

fn listen_for_close(connect: &Connect, lost: &Arc<Lost>) -> VirtResult<()> {
    let opaque = Arc::into_raw(lost.clone()).cast_mut().cast::<c_void>();
    // SAFETY: `opaque` is an `Arc<Lost>` turned raw, which is what `on_close`
    // borrows and `free_lost` takes back.
    let ret = unsafe {
        sys::virConnectRegisterCloseCallback(
            connect.as_ptr(),
            Some(on_close),
            opaque,
            Some(free_lost),
        )
    };
    checked(ret).map(drop).inspect_err(|_| {
        // SAFETY: a failed registration has not taken the reference over.
        unsafe { free_lost(opaque) };
    })
}

/// Undoes [`listen`]. On a dead connection libvirt reports errors, but forgets
/// the callbacks all the same.
pub(super) fn stop_listening(connect: &Connect, callbacks: &Callbacks) {
    for id in &callbacks.domain_events {
        // SAFETY: the id came from this connection.
        unsafe { sys::virConnectDomainEventDeregisterAny(connect.as_ptr(), *id) };
    }
    if callbacks.close {
        // SAFETY: the function that `listen` registered on this connection.
        unsafe { sys::virConnectUnregisterCloseCallback(connect.as_ptr(), Some(on_close)) };
    }
}

type GenericCallback = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);

unsafe extern "C" fn free_sender(opaque: *mut c_void) {
    // SAFETY: called once per registration with the box made for it.
    drop(unsafe { Box::from_raw(opaque.cast::<broadcast::Sender<Event>>()) });
}

unsafe extern "C" fn free_lost(opaque: *mut c_void) {
    // SAFETY: called once per registration with the reference made for it.
    drop(unsafe { Arc::from_raw(opaque.cast_const().cast::<Lost>()) });
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt keeps `opaque` until it calls `free_lost`.
    let lost = unsafe { &*opaque.cast_const().cast::<Lost>() };
    lost.reason.store(reason, Ordering::Release);
    lost.bell.notify_one();
}

/// Sends an event about `domain`.
///
/// # Safety
/// `domain` is a domain that libvirt handed to a callback and `opaque` the
/// boxed sender registered with it.
unsafe fn send(
    domain: sys::virDomainPtr,
    opaque: *mut c_void,
    event: impl FnOnce(InstanceId) -> Event,
) {
    let mut raw = [0_u8; 16];
    // SAFETY: the buffer has the 16 bytes a raw UUID takes.
    let ret = unsafe { sys::virDomainGetUUID(domain, raw.as_mut_ptr()) };
    // SAFETY: by this function's own contract; only borrowed.
    let events = unsafe { &*opaque.cast_const().cast::<broadcast::Sender<Event>>() };
    if ret == 0 {
        // Nobody listening is no error.
        let _ = events.send(event(InstanceId(Uuid::from_bytes(raw))));
    }
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    let what = (u32::try_from(event), u32::try_from(detail));
    let switches = (
        Ok(sys::VIR_DOMAIN_EVENT_SUSPENDED),
        Ok(sys::VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED),
    );
    if what == switches {
        // SAFETY: as libvirt calls it.
        unsafe { send(domain, opaque, Event::SwitchOver) };
    }
    // SAFETY: as libvirt calls it.
    unsafe { send(domain, opaque, Event::Guest) };
    0
}

unsafe extern "C" fn on_metadata(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _kind: c_int,
    _namespace: *const std::ffi::c_char,
    opaque: *mut c_void,
) {
    // SAFETY: as libvirt calls it.
    unsafe { send(domain, opaque, Event::Guest) };
}

unsafe extern "C" fn on_iteration(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _iteration: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: as libvirt calls it.
    unsafe { send(domain, opaque, Event::MigrationIteration) };
}

unsafe extern "C" fn on_job_completed(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _params: sys::virTypedParameterPtr,
    _count: c_int,
    opaque: *mut c_void,
) {
    // SAFETY: as libvirt calls it.
    unsafe { send(domain, opaque, Event::JobCompleted) };
}

/// Size of and free room on a file system, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Room {
    /// Size.
    pub(super) total_bytes: u64,
    /// Free for those who are not root.
    pub(super) free_bytes: u64,
}

/// Room on the file system of `path`.
pub(super) fn room(path: &Path) -> std::io::Result<Room> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut stat = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends with NUL, the output has room for the structure.
    if unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: filled by the successful call.
    let stat = unsafe { stat.assume_init() };
    Ok(Room {
        total_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        free_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

/// QEMU marks the permissions it holds on an image as byte locks from 100 on,
/// twice a hundred bytes.
const QEMU_LOCKS: std::ops::Range<libc::off_t> = 100..300;

/// Whether a QEMU, here or on another node of a shared file system, has the
/// image open.
pub(super) fn is_locked_by_qemu(image: &File) -> std::io::Result<bool> {
    // SAFETY: all-zero is a valid `flock`.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock.l_start = QEMU_LOCKS.start;
    lock.l_len = QEMU_LOCKS.end - QEMU_LOCKS.start;
    // SAFETY: the descriptor is open; the kernel only writes into `lock`.
    if unsafe { libc::fcntl(image.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(lock.l_type != libc::F_UNLCK as libc::c_short)
}

/// Has a child process killed when the thread that starts it ends: of this
/// process, however that dies.
pub(super) fn die_with_parent(command: &mut tokio::process::Command) {
    let parent = std::process::id();
    let prepare = move || {
        // SAFETY: between fork and exec; both calls are async-signal-safe and
        // touch no memory.
        let parent_now = unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            libc::getppid()
        };
        // It died before that was asked for.
        if parent_now.unsigned_abs() != parent {
            return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: the closure allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
}

/// Whether the node has a network interface of that name, and it is up.
pub(super) fn interface_is_up(name: &str) -> std::io::Result<bool> {
    let mut first = ptr::null_mut();
    // SAFETY: the list is written to `first` and freed below.
    if unsafe { libc::getifaddrs(&mut first) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    let mut found = false;
    let mut entry = first;
    while !entry.is_null() {
        // SAFETY: an entry of the list, which lives until freed; its name ends with NUL.
        let (this, entry_name) = unsafe { (&*entry, CStr::from_ptr((*entry).ifa_name)) };
        let up = this.ifa_flags & libc::IFF_UP.unsigned_abs() != 0;
        found |= up && entry_name.to_bytes() == name.as_bytes();
        entry = this.ifa_next;
    }
    // SAFETY: the list of the successful call, freed once.
    unsafe { libc::freeifaddrs(first) };
    Ok(found)
}

/// Has the allocator serve all threads from two arenas. By default each of many
/// short-lived threads (a migration's, a blocking call's) may get one of its own,
/// and what is freed in one is of no use to the others: a slow growth.
pub(super) fn keep_arenas_few() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt() takes two numbers and may be called at any time, from any
    // thread. A value it does not like it refuses, and nothing changes.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives the system back what memory is free: the C library keeps what lies between two
/// pieces that are in use.
pub(super) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim() takes a number and may be called at any time, from any thread;
    // no memory that is in use changes.
    unsafe {
        libc::malloc_trim(0);
    }
}
