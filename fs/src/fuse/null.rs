//! A FUSE server that does nothing: what FUSE itself costs, with braidfs's own transport and its
//! defaults. Nothing on this transport can be faster, so `braidfs bench` and `scripts/bench`
//! measure against it.
//!
//! A tree of names is kept in memory. WRITE copies its payload into an arena that was touched
//! before, READ is answered from that arena, and that is all: what was written is not what is read
//! back. Pieces of the arena have a lock each, so that threads do not wait for each other.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::RwLock;

use super::transport::{
    self, Args, Listing, Malformed, Opcode, REQUEST_BYTES_MAX, Request, open_reply,
};
use super::{AttachError, CacheMode, MountSpec, MsFlags};
use crate::{Attr, Timestamp};

/// How the null server is run.
#[derive(Clone, Debug)]
pub struct NullOptions {
    /// Where it is mounted, an absolute path.
    pub mount_point: PathBuf,
    /// [`CacheMode::Kernel`] for the kernel's write-back cache, else FOPEN_DIRECT_IO.
    pub cache_mode: CacheMode,
    /// Whether others than the caller may look.
    pub allow_other: bool,
    /// Threads that serve requests, from 1.
    pub threads: usize,
    /// Memory that file data is copied into, in pieces of 1 MiB, from 1.
    pub arena_mib: usize,
}

/// Mounts the null server, and serves until it is unmounted.
pub fn serve(options: &NullOptions) -> Result<(), AttachError> {
    let server = Server {
        tree: RwLock::new(Tree::new()),
        arena: Arena::new(options.arena_mib.max(1)),
        open_flags: match options.cache_mode {
            CacheMode::Kernel => open_reply::KEEP_CACHE,
            _ => open_reply::DIRECT_IO | open_reply::PARALLEL_DIRECT_WRITES,
        } | open_reply::NOFLUSH,
    };
    let spec = MountSpec {
        source: "null".to_owned(),
        subtype: "null".to_owned(),
        mount_point: options.mount_point.clone(),
        allow_other: options.allow_other,
        allow_root: false,
        flags: MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
    };
    let threads = options.threads.max(1);
    transport::serve(&spec, options.cache_mode, threads, |request| {
        server.answer(request);
    })
}

/// Memory that was touched before, in pieces as long as the longest request.
struct Arena {
    pieces: Vec<RwLock<Box<[u8]>>>,
}

impl Arena {
    fn new(pieces: usize) -> Self {
        let touched = || vec![1; REQUEST_BYTES_MAX].into_boxed_slice();
        let pieces = (0..pieces).map(|_| RwLock::new(touched())).collect();
        Self { pieces }
    }

    /// The piece for a place in a file, and where in it `len` bytes fit.
    fn place(&self, ino: u64, offset: u64, len: usize) -> (&RwLock<Box<[u8]>>, usize) {
        let long = REQUEST_BYTES_MAX as u64;
        let piece = (ino + offset / long) % self.pieces.len() as u64;
        let start = ((offset % long) as usize).min(REQUEST_BYTES_MAX.saturating_sub(len));
        (&self.pieces[piece as usize], start)
    }
}

/// An inode.
struct Node {
    mode: u32,
    ids: (u32, u32),
    rdev: u32,
    nlink: u32,
    /// Grows without the tree's lock held for writing.
    size: AtomicU64,
    /// Of a symbolic link.
    target: Vec<u8>,
    /// Of a directory: what is in it.
    entries: Option<Box<Entries>>,
}

/// What is in a directory.
#[derive(Default)]
struct Entries {
    /// Names and inodes by cookie.
    list: BTreeMap<u64, (Arc<[u8]>, u64)>,
    /// Inodes and cookies by name.
    names: HashMap<Arc<[u8]>, (u64, u64)>,
}

/// All inodes; the number is the index, 1 is the root. They are never reused.
struct Tree {
    nodes: Vec<Node>,
    next_cookie: u64,
}

impl Tree {
    fn new() -> Self {
        let mut tree = Self {
            nodes: Vec::new(),
            next_cookie: 3,
        };
        tree.add_node(0, (0, 0), 0);
        // Whoever serves it may write to it.
        let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
        tree.add_node(libc::S_IFDIR | 0o755, (uid.as_raw(), gid.as_raw()), 0);
        tree
    }

    fn add_node(&mut self, mode: u32, ids: (u32, u32), rdev: u32) -> u64 {
        self.nodes.push(Node {
            mode,
            ids,
            rdev,
            nlink: 1,
            size: AtomicU64::new(0),
            target: Vec::new(),
            entries: (mode & libc::S_IFMT == libc::S_IFDIR).then(Box::default),
        });
        self.nodes.len() as u64 - 1
    }

    fn node(&self, ino: u64) -> Result<&Node, i32> {
        self.nodes.get(ino as usize).ok_or(libc::ESTALE)
    }

    fn node_mut(&mut self, ino: u64) -> Result<&mut Node, i32> {
        self.nodes.get_mut(ino as usize).ok_or(libc::ESTALE)
    }

    fn entries_mut(&mut self, dir: u64) -> Result<&mut Entries, i32> {
        self.node_mut(dir)?
            .entries
            .as_deref_mut()
            .ok_or(libc::ENOTDIR)
    }

    fn child(&self, dir: u64, name: &[u8]) -> Option<u64> {
        let entries = self.node(dir).ok()?.entries.as_deref()?;
        entries.names.get(name).map(|found| found.0)
    }

    fn link(&mut self, dir: u64, name: &[u8], ino: u64) -> Result<(), i32> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let name: Arc<[u8]> = Arc::from(name);
        let dir = self.entries_mut(dir)?;
        dir.names.insert(Arc::clone(&name), (ino, cookie));
        dir.list.insert(cookie, (name, ino));
        Ok(())
    }

    fn unlink(&mut self, dir: u64, name: &[u8]) -> Result<u64, i32> {
        let dir = self.entries_mut(dir)?;
        let (ino, cookie) = dir.names.remove(name).ok_or(libc::ENOENT)?;
        dir.list.remove(&cookie);
        let node = self.node_mut(ino)?;
        node.nlink = node.nlink.saturating_sub(1);
        Ok(ino)
    }

    fn rename(&mut self, from: (u64, &[u8]), to: (u64, &[u8])) -> Result<(), i32> {
        let ino = self.unlink(from.0, from.1)?;
        let _replaced = self.unlink(to.0, to.1);
        self.node_mut(ino)?.nlink += 1;
        self.link(to.0, to.1, ino)
    }

    fn attr(&self, ino: u64) -> Result<Attr, i32> {
        let node = self.node(ino)?;
        let epoch = Timestamp { secs: 0, nanos: 0 };
        let size = node.size.load(Relaxed);
        Ok(Attr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            btime: epoch,
            mode: node.mode,
            nlink: node.nlink,
            uid: node.ids.0,
            gid: node.ids.1,
            rdev: node.rdev,
            flags: 0,
            generation: 0,
        })
    }
}

/// The errno of a request that cannot be served.
struct Failed(i32);

impl From<i32> for Failed {
    fn from(errno: i32) -> Self {
        Self(errno)
    }
}

impl From<Malformed> for Failed {
    fn from(_: Malformed) -> Self {
        Self(libc::EINVAL)
    }
}

/// What to answer.
enum Answer {
    Done,
    Entry(Option<Attr>),
    Attr(Attr),
    Created(Attr),
    Listing(Listing),
    Bytes(Vec<u8>),
}

struct Server {
    tree: RwLock<Tree>,
    arena: Arena,
    open_flags: u32,
}

impl Server {
    fn answer(&self, request: Request<'_>) {
        match request.opcode() {
            Some(Opcode::Read) => self.read(request),
            Some(Opcode::Write) => self.write(request),
            Some(Opcode::Forget | Opcode::BatchForget | Opcode::Interrupt) => {}
            Some(Opcode::Open) => {
                let ino = request.ino();
                request.opened(ino, self.open_flags);
            }
            Some(Opcode::Opendir) => request.opened(0, open_reply::KEEP_CACHE),
            Some(Opcode::Release | Opcode::Releasedir | Opcode::Fsync | Opcode::Fsyncdir) => {
                request.fail(0);
            }
            Some(Opcode::Statfs) => request.statfs(1 << 30),
            Some(opcode) => {
                let (ino, ids, args) = (request.ino(), request.ids(), request.args);
                match self.change(opcode, ino, ids, args) {
                    Ok(Answer::Done) => request.fail(0),
                    Ok(Answer::Entry(attr)) => request.entry(attr.as_ref()),
                    Ok(Answer::Attr(attr)) => request.attr(&attr),
                    Ok(Answer::Created(attr)) => request.created(&attr, attr.ino, self.open_flags),
                    Ok(Answer::Listing(listing)) => request.listing(&listing),
                    Ok(Answer::Bytes(bytes)) => request.bytes(&bytes),
                    Err(Failed(errno)) => request.fail(errno),
                }
            }
            None => request.fail(libc::ENOSYS),
        }
    }

    fn read(&self, mut request: Request<'_>) {
        let parsed = (|| {
            let args = &mut request.args;
            Ok::<_, Malformed>((args.u64()?, args.u64()?, args.u32()?))
        })();
        let Ok((ino, offset, len)) = parsed else {
            return request.fail(libc::EINVAL);
        };
        let size = self
            .tree
            .read()
            .node(ino)
            .map(|node| node.size.load(Relaxed));
        let size = match size {
            Ok(size) => size,
            Err(errno) => return request.fail(errno),
        };
        let len = u64::from(len).min(size.saturating_sub(offset)) as usize;
        let len = len.min(REQUEST_BYTES_MAX);
        let (piece, start) = self.arena.place(ino, offset, len);
        request.bytes(&piece.read()[start..start + len]);
    }

    fn write(&self, mut request: Request<'_>) {
        let parsed = (|| {
            let args = &mut request.args;
            let (ino, offset, len) = (args.u64()?, args.u64()?, args.u32()?);
            args.skip(4 + 8 + 4 + 4)?; // flags of the write, lock owner, flags of the file
            Ok::<_, Malformed>((ino, offset, len, args.bytes(len as usize)?))
        })();
        let Ok((ino, offset, len, payload)) = parsed else {
            return request.fail(libc::EINVAL);
        };
        let end = offset.saturating_add(u64::from(len));
        let grown = self.tree.read().node(ino).map(|node| {
            if node.size.load(Relaxed) < end {
                node.size.fetch_max(end, Relaxed);
            }
        });
        if let Err(errno) = grown {
            return request.fail(errno);
        }
        let (piece, start) = self.arena.place(ino, offset, payload.len());
        piece.write()[start..start + payload.len()].copy_from_slice(payload);
        request.written(len);
    }

    /// Everything that is about names and attributes.
    fn change(
        &self,
        opcode: Opcode,
        ino: u64,
        ids: (u32, u32),
        mut args: Args<'_>,
    ) -> Result<Answer, Failed> {
        match opcode {
            Opcode::Lookup => {
                let (tree, name) = (self.tree.read(), args.name()?);
                let child = tree.child(ino, name);
                Ok(Answer::Entry(child.map(|ino| tree.attr(ino)).transpose()?))
            }
            Opcode::Getattr => Ok(Answer::Attr(self.tree.read().attr(ino)?)),
            Opcode::Setattr => self.setattr(ino, args),
            Opcode::Create => {
                args.skip(4)?;
                let mode = args.u32()? & !args.u32()?;
                args.skip(4)?;
                Ok(Answer::Created(self.make(
                    ino,
                    args.name()?,
                    mode,
                    ids,
                    0,
                )?))
            }
            Opcode::Mknod => {
                let (mode, rdev, umask) = (args.u32()?, args.u32()?, args.u32()?);
                args.skip(4)?;
                let made = self.make(ino, args.name()?, mode & !umask, ids, rdev)?;
                Ok(Answer::Entry(Some(made)))
            }
            Opcode::Mkdir => {
                let mode = libc::S_IFDIR | args.u32()? & !args.u32()?;
                let made = self.make(ino, args.name()?, mode, ids, 0)?;
                Ok(Answer::Entry(Some(made)))
            }
            Opcode::Symlink => {
                let (name, target) = (args.name()?, args.name()?);
                let made = self.make(ino, name, libc::S_IFLNK | 0o777, ids, 0)?;
                let mut tree = self.tree.write();
                let node = tree.node_mut(made.ino)?;
                node.target = target.to_vec();
                node.size.store(target.len() as u64, Relaxed);
                Ok(Answer::Entry(Some(tree.attr(made.ino)?)))
            }
            Opcode::Link => {
                let (old, name) = (args.u64()?, args.name()?);
                let mut tree = self.tree.write();
                tree.node_mut(old)?.nlink += 1;
                tree.link(ino, name, old)?;
                Ok(Answer::Entry(Some(tree.attr(old)?)))
            }
            Opcode::Readlink => Ok(Answer::Bytes(self.tree.read().node(ino)?.target.clone())),
            Opcode::Unlink | Opcode::Rmdir => {
                self.tree.write().unlink(ino, args.name()?)?;
                Ok(Answer::Done)
            }
            Opcode::Rename | Opcode::Rename2 => {
                let to = args.u64()?;
                if opcode == Opcode::Rename2 {
                    args.skip(8)?;
                }
                let (old, new) = (args.name()?, args.name()?);
                self.tree.write().rename((ino, old), (to, new))?;
                Ok(Answer::Done)
            }
            Opcode::Readdir | Opcode::Readdirplus => {
                self.list(ino, opcode == Opcode::Readdirplus, args)
            }
            // The kernel then does without: no extended attributes, seeking, preallocation.
            _ => Err(Failed(libc::ENOSYS)),
        }
    }

    fn make(
        &self,
        dir: u64,
        name: &[u8],
        mode: u32,
        ids: (u32, u32),
        rdev: u32,
    ) -> Result<Attr, Failed> {
        let mut tree = self.tree.write();
        let ino = tree.add_node(mode, ids, rdev);
        tree.link(dir, name, ino)?;
        Ok(tree.attr(ino)?)
    }

    fn setattr(&self, ino: u64, mut args: Args<'_>) -> Result<Answer, Failed> {
        const MODE: u32 = 1;
        const UID: u32 = 2;
        const GID: u32 = 4;
        const SIZE: u32 = 8;
        let valid = args.u32()?;
        args.skip(4 + 8)?;
        let size = args.u64()?;
        args.skip(8 + 3 * 8 + 3 * 4)?;
        let mode = args.u32()?;
        args.skip(4)?;
        let ids = (args.u32()?, args.u32()?);
        let mut tree = self.tree.write();
        let node = tree.node_mut(ino)?;
        if valid & MODE != 0 {
            node.mode = node.mode & libc::S_IFMT | mode & 0o7777;
        }
        if valid & UID != 0 {
            node.ids.0 = ids.0;
        }
        if valid & GID != 0 {
            node.ids.1 = ids.1;
        }
        if valid & SIZE != 0 {
            node.size.store(size, Relaxed);
        }
        Ok(Answer::Attr(tree.attr(ino)?))
    }

    fn list(&self, dir: u64, plus: bool, mut args: Args<'_>) -> Result<Answer, Failed> {
        args.skip(8)?;
        let (after, size) = (args.u64()?, args.u32()?);
        let tree = self.tree.read();
        let mut listing = Listing::new(size);
        let entries = tree.node(dir)?.entries.as_deref().ok_or(libc::ENOTDIR)?;
        for (cookie, (name, ino)) in entries.list.range(after.saturating_add(1)..) {
            if !listing.has_room(plus, name) {
                break;
            }
            let attr = tree.attr(*ino)?;
            let kind = (attr.mode >> 12) as u8;
            if plus {
                listing.add_plus(&attr, *cookie, kind, name);
            } else {
                listing.add(*ino, *cookie, kind, name);
            }
        }
        Ok(Answer::Listing(listing))
    }
}
