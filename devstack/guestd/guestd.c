/*
 * guestd: the whole user space of a devstack guest, run as PID 1.
 *
 * It exists so that a migration can be judged from outside:
 *   port 7   TCP echo; a session held open shows for how long the guest stood still
 *   port 9   one line of JSON with what is known now, then the connection closes
 *   port 10  the same after checking all rewritten memory and every record on the disk
 *
 * Memory: a region is rewritten page by page, for ever. Each page holds a pattern made of its
 * index and of the pass that wrote it, and is checked before it is rewritten, so a page that
 * was lost, or arrived in an older state, is found within one pass and counted in mem_errors.
 *
 * Disk: numbered records go into a ring on /dev/vda, past the page cache. A check reads the ring
 * and wants every record up to the last one acknowledged, so one lost write shows as a gap.
 * After a reboot the count goes on from the highest record found, which disk_found tells.
 * Each record names the boot that wrote it, and a page after the ring the boot that writes now. Whoever else writes to
 * this disk is found by these, before each record and by a check, and counted in disk_foreign.
 *
 * Clock: with drover.clock_ms= a thread that has the processor whenever it wants sleeps so long at a
 * time. longest_gap_ms is the longest between two times that it ran, since that was last asked for; null
 * without the thread, which costs an emulated guest a lot. A guest cannot see everything: while its
 * hypervisor has stopped it, its clock stands still too.
 *
 * Network: when a link comes up again, as on being plugged in elsewhere, the guest forgets its
 * neighbours, who may be others with the same addresses, and announces itself.
 *
 * Kernel command line: drover.name= drover.ip=ADDR/BITS drover.mem_mib= drover.dirty_mib_s=
 * drover.disk_hz= drover.clock_ms= drover.busy_percent= (of a processor, kept busy for nothing; 0 switches a load off),
 * drover.acpi=ignore (the power button does nothing), and drover.probe, which powers off as soon as the guest is up.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/input.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/if_ether.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define WORDS (PAGE / 8)
#define SLOTS 4096 /* records in the ring: 16 MiB of disk */
#define OWNER_AT ((off_t)SLOTS * PAGE)
#define RECORD_MAGIC 0x6472766f72656331ull
#define MAX_PEERS 64
#define MAX_BUTTONS 8

/* Each module after those it needs. */
static const char *const modules[] = {
	"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
	"virtio_blk", "failover", "net_failover", "virtio_net", "evdev", "button",
};

static char cmdline[4096];
static char name[64] = "guest";

static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t *memory;
static uint64_t memory_pages, memory_rewrites, memory_errors;
static unsigned dirty_mib_s = 4;

static pthread_mutex_t disk_lock = PTHREAD_MUTEX_INITIALIZER;
static int disk = -1;
static uint64_t disk_found, disk_written, disk_verified, disk_errors, disk_foreign, boot_id;
static bool disk_gap; /* the last check missed a record */
static unsigned disk_hz = 10;

static unsigned busy_percent;

static _Atomic uint64_t longest_gap_us;
static unsigned clock_ms;

static uint64_t now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static uint64_t now_ms(void)
{
	return now_us() / 1000;
}

static void sleep_ms(unsigned ms)
{
	struct timespec t = { ms / 1000, (ms % 1000) * 1000000L };
	nanosleep(&t, NULL);
}

/* The value of `key=` on the kernel command line, or NULL. */
static const char *option(const char *key, char *value, size_t size)
{
	size_t n = strlen(key);
	for (const char *p = cmdline; (p = strstr(p, key)); p += n) {
		if ((p == cmdline || p[-1] == ' ') && p[n] == '=') {
			size_t length = strcspn(p + n + 1, " \n");
			snprintf(value, size, "%.*s", (int)length, p + n + 1);
			return value;
		}
	}
	return NULL;
}

static unsigned number(const char *key, unsigned otherwise)
{
	char value[32];
	return option(key, value, sizeof value) ? strtoul(value, NULL, 10) : otherwise;
}

static void power_off(void)
{
	printf("guestd: %s powers off\n", name);
	fflush(stdout);
	sync();
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

/* ---- memory ------------------------------------------------------------------------------- */

static uint64_t scramble(uint64_t x)
{
	x += 0x9e3779b97f4a7c15ull;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
	return x ^ (x >> 27);
}

static void page_write(uint64_t index, uint64_t pass)
{
	uint64_t *page = memory + index * WORDS, x = scramble(index << 32 ^ pass);
	for (int i = 0; i < WORDS; i++, x += 0x9e3779b97f4a7c15ull)
		page[i] = x;
}

static bool page_intact(uint64_t index, uint64_t pass)
{
	const uint64_t *page = memory + index * WORDS;
	uint64_t x = scramble(index << 32 ^ pass), wrong = 0;
	for (int i = 0; i < WORDS; i++, x += 0x9e3779b97f4a7c15ull)
		wrong |= page[i] ^ x;
	return wrong == 0;
}

/* Pass 0 wrote every page; rewrite number r is page r % pages in pass r / pages + 1. */
static uint64_t pass_of(uint64_t index)
{
	uint64_t pass = memory_rewrites / memory_pages;
	return index < memory_rewrites % memory_pages ? pass + 1 : pass;
}

static void rewrite_next(void)
{
	uint64_t index = memory_rewrites % memory_pages;
	if (!page_intact(index, pass_of(index)))
		memory_errors++;
	page_write(index, pass_of(index) + 1);
	memory_rewrites++;
}

static void *rewrite_memory(void *unused)
{
	const unsigned period = 20; /* ms */
	uint64_t owed = 0; /* thousandths of a page */
	(void)unused;
	for (uint64_t due = now_ms();; due += period) {
		uint64_t now = now_ms();
		if (now < due)
			sleep_ms(due - now);
		else
			due = now; /* late, or paused by a migration: no burst to catch up */
		owed += (uint64_t)dirty_mib_s * 256 * period;
		for (; owed >= 1000; owed -= 1000) {
			pthread_mutex_lock(&memory_lock);
			rewrite_next();
			pthread_mutex_unlock(&memory_lock);
		}
	}
	return NULL;
}

static void check_memory(void)
{
	for (uint64_t i = 0; i < memory_pages; i++) {
		pthread_mutex_lock(&memory_lock);
		if (!page_intact(i, pass_of(i)))
			memory_errors++;
		pthread_mutex_unlock(&memory_lock);
	}
}

/* ---- disk --------------------------------------------------------------------------------- */

static void record_make(uint64_t *record, uint64_t n, uint64_t boot)
{
	uint64_t x = scramble(n ^ boot);
	record[0] = RECORD_MAGIC;
	record[1] = n;
	record[2] = boot;
	for (int i = 3; i < WORDS; i++, x += 0x9e3779b97f4a7c15ull)
		record[i] = x;
}

static uint64_t record_number(const uint64_t *record)
{
	uint64_t want[WORDS];
	record_make(want, record[1], record[2]);
	return memcmp(want, record, PAGE) == 0 ? record[1] : 0;
}

static bool slot_read(uint64_t *record, uint64_t n)
{
	return pread(disk, record, PAGE, (off_t)(n % SLOTS) * PAGE) == PAGE;
}

/* Whether another boot has the disk, or is ahead of this one. */
static bool foreign_near(uint64_t *record, uint64_t n)
{
	if (pread(disk, record, PAGE, OWNER_AT) == PAGE && record[0] != boot_id)
		return true;
	return slot_read(record, n) && record_number(record) >= n && record[2] != boot_id;
}

static void own_disk(void)
{
	uint64_t *page = aligned_alloc(PAGE, PAGE);
	memset(page, 0, PAGE);
	page[0] = boot_id;
	if (pwrite(disk, page, PAGE, OWNER_AT) != PAGE || fdatasync(disk) != 0)
		disk_errors++;
	free(page);
}

/* Fills numbers[slot] with the record each slot holds (0: none that is intact), boots[slot] with who wrote it. */
static bool read_ring(uint64_t *numbers, uint64_t *boots)
{
	const size_t chunk = 64 * PAGE;
	uint64_t *buffer = aligned_alloc(PAGE, chunk);
	bool read_all = true;
	for (size_t slot = 0; slot < SLOTS; slot += 64) {
		bool ok = pread(disk, buffer, chunk, (off_t)slot * PAGE) == (ssize_t)chunk;
		read_all &= ok;
		for (size_t i = 0; i < 64; i++) {
			numbers[slot + i] = ok ? record_number(buffer + i * WORDS) : 0;
			boots[slot + i] = buffer[i * WORDS + 2];
		}
	}
	free(buffer);
	return read_all;
}

static void check_disk(void)
{
	static uint64_t numbers[SLOTS], boots[SLOTS];
	if (disk < 0)
		return;
	pthread_mutex_lock(&disk_lock);
	if (!read_ring(numbers, boots))
		disk_errors++;
	uint64_t n = disk_written > SLOTS ? disk_written - SLOTS + 1 : 1;
	for (; n <= disk_written && numbers[n % SLOTS] == n; n++)
		disk_foreign += n > disk_found && boots[n % SLOTS] != boot_id;
	disk_verified = n - 1;
	disk_gap = disk_verified < disk_written;
	pthread_mutex_unlock(&disk_lock);
}

static void *write_disk(void *unused)
{
	uint64_t *record = aligned_alloc(PAGE, PAGE);
	(void)unused;
	for (;;) {
		pthread_mutex_lock(&disk_lock);
		uint64_t n = disk_written + 1;
		disk_foreign += foreign_near(record, n);
		record_make(record, n, boot_id);
		if (pwrite(disk, record, PAGE, (off_t)(n % SLOTS) * PAGE) == PAGE && fdatasync(disk) == 0)
			disk_written = n;
		else
			disk_errors++;
		pthread_mutex_unlock(&disk_lock);
		sleep_ms(1000 / disk_hz);
	}
	return NULL;
}

static void open_disk(void)
{
	static uint64_t numbers[SLOTS], boots[SLOTS];
	for (int i = 0; i < 50 && disk < 0; i++) {
		disk = open("/dev/vda", O_RDWR | O_DIRECT | O_CLOEXEC);
		if (disk < 0)
			sleep_ms(20);
	}
	if (disk < 0) {
		printf("guestd: no disk at /dev/vda\n");
		return;
	}
	read_ring(numbers, boots);
	for (int i = 0; i < SLOTS; i++)
		if (numbers[i] > disk_written)
			disk_written = numbers[i];
	disk_found = disk_written;
	own_disk();
	check_disk();
}

/* ---- clock -------------------------------------------------------------------------------- */

static void *watch_clock(void *unused)
{
	struct sched_param first = { .sched_priority = 1 };
	(void)unused;
	/* Ahead of the guest's own work, which is not what is looked for. */
	if (pthread_setschedparam(pthread_self(), SCHED_FIFO, &first) != 0)
		printf("guestd: the clock has no priority\n");
	for (uint64_t last = now_us();;) {
		sleep_ms(clock_ms);
		uint64_t now = now_us(), longest = longest_gap_us;
		while (now - last > longest &&
			!atomic_compare_exchange_weak(&longest_gap_us, &longest, now - last))
			;
		last = now;
	}
	return NULL;
}

/* ---- processor ---------------------------------------------------------------------------- */

static void *be_busy(void *unused)
{
	const unsigned period = 50; /* ms */
	(void)unused;
	for (;;) {
		uint64_t until = now_us() + period * 10 * busy_percent;
		while (now_us() < until)
			;
		sleep_ms(period - period * busy_percent / 100 + 1);
	}
	return NULL;
}

/* ---- status ------------------------------------------------------------------------------- */

static void send_status(int fd)
{
	char line[704], gap[32] = "null";
	uint64_t gap_us = atomic_exchange(&longest_gap_us, 0);
	if (clock_ms)
		snprintf(gap, sizeof gap, "%.3f", gap_us / 1e3);
	pthread_mutex_lock(&memory_lock);
	pthread_mutex_lock(&disk_lock);
	int n = snprintf(line, sizeof line,
		"{\"name\":\"%s\",\"uptime_ms\":%llu,\"longest_gap_ms\":%s,\"mem_mib\":%llu,\"dirty_mib_s\":%u,"
		"\"mem_rewrites\":%llu,\"mem_errors\":%llu,\"mem_ok\":%s,"
		"\"disk_found\":%llu,\"disk_written\":%llu,\"disk_verified\":%llu,\"disk_errors\":%llu,"
		"\"disk_foreign\":%llu,\"disk_ok\":%s}\n",
		name, (unsigned long long)now_ms(), gap, (unsigned long long)memory_pages / 256, dirty_mib_s,
		(unsigned long long)memory_rewrites, (unsigned long long)memory_errors,
		memory_errors ? "false" : "true",
		(unsigned long long)disk_found, (unsigned long long)disk_written,
		(unsigned long long)disk_verified, (unsigned long long)disk_errors,
		(unsigned long long)disk_foreign,
		disk >= 0 && !disk_errors && !disk_gap && !disk_foreign ? "true" : "false");
	pthread_mutex_unlock(&disk_lock);
	pthread_mutex_unlock(&memory_lock);
	if (write(fd, line, n) < 0)
		perror("guestd: status");
	close(fd);
}

/* One at a time, on a thread of its own: the echo must not wait for it. */
static void *check_and_send(void *argument)
{
	static pthread_mutex_t one = PTHREAD_MUTEX_INITIALIZER;
	pthread_mutex_lock(&one);
	check_memory();
	check_disk();
	send_status((int)(intptr_t)argument);
	pthread_mutex_unlock(&one);
	return NULL;
}

static void spawn(void *(*body)(void *), void *argument)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, body, argument) == 0)
		pthread_detach(thread);
	else
		perror("guestd: thread");
}

/* ---- network ------------------------------------------------------------------------------ */

static void set_address(struct ifreq *request, int s, unsigned long what, uint32_t address)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(address) };
	memcpy(&request->ifr_addr, &in, sizeof in);
	if (ioctl(s, what, request) < 0)
		perror("guestd: address");
}

static void interface_up(const char *interface, const char *ip)
{
	struct ifreq request = { 0 };
	char address[32];
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), bits = 24;
	snprintf(request.ifr_name, sizeof request.ifr_name, "%s", interface);
	for (int i = 0; i < 250 && ioctl(s, SIOCGIFFLAGS, &request) < 0; i++)
		sleep_ms(20);
	if (ip && sscanf(ip, "%31[0-9.]/%d", address, &bits) >= 1) {
		struct in_addr parsed;
		inet_aton(address, &parsed);
		set_address(&request, s, SIOCSIFADDR, ntohl(parsed.s_addr));
		set_address(&request, s, SIOCSIFNETMASK, ~0u << (32 - bits));
		ioctl(s, SIOCGIFFLAGS, &request);
	}
	request.ifr_flags |= IFF_UP | IFF_RUNNING;
	if (ioctl(s, SIOCSIFFLAGS, &request) < 0)
		perror("guestd: interface");
	close(s);
}

/* Asks everybody on the network for its own address: they note who asks. */
static void announce(int s, const char *interface)
{
	struct ifreq request = { 0 };
	struct ether_arp arp = { .arp_hrd = htons(ARPHRD_ETHER), .arp_pro = htons(ETHERTYPE_IP),
		.arp_hln = 6, .arp_pln = 4, .arp_op = htons(ARPOP_REQUEST) };
	struct sockaddr_ll all = { .sll_family = AF_PACKET, .sll_protocol = htons(ETHERTYPE_ARP),
		.sll_ifindex = if_nametoindex(interface), .sll_halen = 6,
		.sll_addr = { 255, 255, 255, 255, 255, 255 } };
	snprintf(request.ifr_name, sizeof request.ifr_name, "%s", interface);
	if (ioctl(s, SIOCGIFADDR, &request) < 0)
		return; /* it has none */
	memcpy(arp.arp_spa, &((struct sockaddr_in *)&request.ifr_addr)->sin_addr, 4);
	memcpy(arp.arp_tpa, arp.arp_spa, 4);
	ioctl(s, SIOCGIFHWADDR, &request);
	memcpy(arp.arp_sha, request.ifr_hwaddr.sa_data, 6);
	int raw = socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (sendto(raw, &arp, sizeof arp, 0, (struct sockaddr *)&all, sizeof all) < 0)
		perror("guestd: announcement");
	close(raw);
}

static void forget_neighbours(int s, const char *interface)
{
	char line[256], address[32], device[16];
	FILE *table = fopen("/proc/net/arp", "re");
	while (table && fgets(line, sizeof line, table)) {
		struct arpreq entry = { .arp_pa.sa_family = AF_INET };
		if (sscanf(line, "%31s %*s %*s %*s %*s %15s", address, device) == 2 &&
			strcmp(device, interface) == 0 &&
			inet_aton(address, &((struct sockaddr_in *)&entry.arp_pa)->sin_addr)) {
			snprintf(entry.arp_dev, sizeof entry.arp_dev, "%s", device);
			ioctl(s, SIOCDARP, &entry);
		}
	}
	if (table)
		fclose(table);
}

/* A link that goes down and up quickly may tell of the second only. */
static void *watch_link(void *argument)
{
	const char *interface = argument;
	struct sockaddr_nl links = { .nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK };
	struct ifreq request = { 0 };
	char event[8192];
	int news = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
	int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	snprintf(request.ifr_name, sizeof request.ifr_name, "%s", interface);
	if (bind(news, (struct sockaddr *)&links, sizeof links) < 0) {
		perror("guestd: links");
		return NULL;
	}
	while (recv(news, event, sizeof event, 0) > 0 || errno == EINTR || errno == ENOBUFS) {
		if (ioctl(s, SIOCGIFFLAGS, &request) == 0 && request.ifr_flags & IFF_RUNNING) {
			forget_neighbours(s, interface);
			announce(s, interface);
		}
	}
	return NULL;
}

static int listen_on(int port)
{
	struct sockaddr_in in = { .sin_family = AF_INET, .sin_port = htons(port) };
	int s = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), on = 1;
	setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
	if (bind(s, (struct sockaddr *)&in, sizeof in) < 0 || listen(s, 64) < 0)
		perror("guestd: listen");
	return s;
}

struct peer {
	int fd;
	size_t held; /* bytes read and not yet echoed */
	char buffer[16384];
};
static struct peer peers[MAX_PEERS];
static int peer_count;

static void peer_add(int fd)
{
	int on = 1;
	if (peer_count == MAX_PEERS) {
		close(fd);
		return;
	}
	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	peers[peer_count].fd = fd;
	peers[peer_count++].held = 0;
}

/* Echoes what there is; false once the peer is gone. Reads no more than it can give back. */
static bool peer_serve(struct peer *p)
{
	if (p->held == 0) {
		ssize_t n = read(p->fd, p->buffer, sizeof p->buffer);
		if (n <= 0)
			return n < 0 && (errno == EAGAIN || errno == EINTR);
		p->held = n;
	}
	ssize_t n = write(p->fd, p->buffer, p->held);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	memmove(p->buffer, p->buffer + n, p->held - n);
	p->held -= n;
	return true;
}

/* ---- start -------------------------------------------------------------------------------- */

static void load_modules(void)
{
	char path[128];
	for (size_t i = 0; i < sizeof modules / sizeof *modules; i++) {
		snprintf(path, sizeof path, "/modules/%s.ko", modules[i]);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			continue; /* built into this kernel */
		if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
			perror(path);
		close(fd);
	}
}

static int open_buttons(struct pollfd *fds)
{
	int count = 0;
	char acpi[16];
	struct dirent *entry;
	DIR *directory = NULL;
	if (!option("drover.acpi", acpi, sizeof acpi) || strcmp(acpi, "ignore") != 0)
		directory = opendir("/dev/input");
	while (directory && count < MAX_BUTTONS && (entry = readdir(directory))) {
		char path[300];
		snprintf(path, sizeof path, "/dev/input/%s", entry->d_name);
		if (strncmp(entry->d_name, "event", 5) == 0) {
			int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
			if (fd >= 0)
				fds[count++] = (struct pollfd){ .fd = fd, .events = POLLIN };
		}
	}
	if (directory)
		closedir(directory);
	return count;
}

static bool power_button(int fd)
{
	struct input_event event;
	while (read(fd, &event, sizeof event) == sizeof event)
		if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
			return true;
	return false;
}

static void serve(void)
{
	static struct pollfd fds[3 + MAX_BUTTONS + MAX_PEERS];
	static const int ports[3] = { 7, 9, 10 };
	for (int i = 0; i < 3; i++)
		fds[i] = (struct pollfd){ .fd = listen_on(ports[i]), .events = POLLIN };
	int fixed = 3 + open_buttons(fds + 3);
	printf("guestd: %s is up after %llu ms\n", name, (unsigned long long)now_ms());
	fflush(stdout);
	for (;;) {
		int serving = peer_count;
		for (int i = 0; i < serving; i++)
			fds[fixed + i] = (struct pollfd){ .fd = peers[i].fd,
				.events = peers[i].held ? POLLOUT : POLLIN };
		if (poll(fds, fixed + serving, -1) < 0)
			continue;
		/* Backwards, because a peer that leaves is replaced by the last one. */
		for (int i = serving - 1; i >= 0; i--) {
			if (fds[fixed + i].revents && !peer_serve(&peers[i])) {
				close(peers[i].fd);
				peers[i] = peers[--peer_count];
			}
		}
		for (int i = 3; i < fixed; i++)
			if (fds[i].revents && power_button(fds[i].fd))
				power_off();
		for (int i = 0; i < 3; i++) {
			if (!fds[i].revents)
				continue;
			int fd = accept4(fds[i].fd, NULL, NULL, SOCK_CLOEXEC | (i ? 0 : SOCK_NONBLOCK));
			if (fd < 0)
				continue;
			if (i == 0)
				peer_add(fd);
			else if (i == 1)
				send_status(fd);
			else
				spawn(check_and_send, (void *)(intptr_t)fd);
		}
	}
}

int main(void)
{
	char ip[40];
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	int console = open("/dev/console", O_WRONLY | O_CLOEXEC);
	if (console >= 0) {
		dup2(console, 1);
		dup2(console, 2);
	}
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	if (fd >= 0 && read(fd, cmdline, sizeof cmdline - 1) < 0)
		perror("guestd: /proc/cmdline");
	option("drover.name", name, sizeof name);
	if (strstr(cmdline, "drover.probe")) {
		printf("guestd: probe is up\n");
		power_off();
	}
	dirty_mib_s = number("drover.dirty_mib_s", dirty_mib_s);
	disk_hz = number("drover.disk_hz", disk_hz);

	load_modules();
	interface_up("lo", "127.0.0.1/8");
	interface_up("eth0", option("drover.ip", ip, sizeof ip));
	spawn(watch_link, "eth0");
	clock_ms = number("drover.clock_ms", 0);
	if (clock_ms)
		spawn(watch_clock, NULL);
	busy_percent = number("drover.busy_percent", 0);
	if (busy_percent > 100)
		busy_percent = 100;
	if (busy_percent)
		spawn(be_busy, NULL);
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	boot_id = scramble((uint64_t)now.tv_sec * 1000000000 + now.tv_nsec);
	open_disk();

	memory_pages = (uint64_t)number("drover.mem_mib", 32) * 256;
	if (memory_pages == 0)
		memory_pages = 1;
	memory = mmap(NULL, memory_pages * PAGE, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (memory == MAP_FAILED) {
		perror("guestd: drover.mem_mib");
		power_off();
	}
	for (uint64_t i = 0; i < memory_pages; i++)
		page_write(i, 0);
	if (dirty_mib_s)
		spawn(rewrite_memory, NULL);
	if (disk >= 0 && disk_hz)
		spawn(write_disk, NULL);
	serve();
}
