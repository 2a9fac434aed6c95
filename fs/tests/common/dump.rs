//! What a file system holds, read back for comparison.

use std::collections::BTreeMap;
use std::sync::Arc;

use braidfs::{Errno, FileSystem, Ino, ROOT_INO};

use super::model::{Dump, DumpNode, PAGE};
use super::try_read;

/// The entries of a directory, listed in batches; "." and ".." are checked and left out.
pub fn entries(fs: &FileSystem, dir: Ino, batch: u64) -> BTreeMap<Vec<u8>, Ino> {
    let mut found = BTreeMap::new();
    let (mut cookie, mut dots) = (0, 0);
    loop {
        let mut count = 0;
        fs.readdir(dir, cookie, &mut |entry| {
            cookie = entry.cookie;
            count += 1;
            if entry.name == b"." || entry.name == b".." {
                dots += 1;
            } else {
                let former = found.insert(entry.name.to_vec(), entry.ino);
                assert!(former.is_none(), "a name is listed twice");
            }
            count < batch
        })
        .expect("readdir");
        if count == 0 {
            assert_eq!(dots, 2);
            return found;
        }
    }
}

/// Everything that can be seen from the root.
pub fn dump(fs: &Arc<FileSystem>) -> Dump {
    let mut out = BTreeMap::new();
    let mut todo = vec![ROOT_INO];
    while let Some(ino) = todo.pop() {
        let attr = fs.getattr(ino).expect("getattr");
        let mut node = DumpNode {
            attr: [attr.mode, attr.nlink, attr.uid, attr.gid, attr.rdev],
            ..DumpNode::default()
        };
        let names = fs.listxattr(ino).expect("listxattr");
        for name in names
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
        {
            let value = fs.getxattr(ino, name).expect("getxattr");
            node.xattrs.insert(name.to_vec(), value);
        }
        match attr.mode & libc::S_IFMT {
            libc::S_IFDIR => {
                node.entries = entries(fs, ino, 100);
                todo.extend(node.entries.values().filter(|ino| !out.contains_key(*ino)));
            }
            libc::S_IFLNK => node.target = fs.readlink(ino).expect("readlink"),
            libc::S_IFREG => {
                node.size = attr.size;
                node.pages = pages_of(fs, ino, attr.size);
            }
            _ => {}
        }
        out.insert(ino, node);
    }
    Dump(out)
}

/// Checksums of the pages of a file that are not zero.
fn pages_of(fs: &Arc<FileSystem>, ino: Ino, size: u64) -> BTreeMap<u64, u32> {
    const STEP: u64 = 1 << 20;
    let file = fs.open(ino, libc::O_RDONLY).expect("open");
    let mut pages = BTreeMap::new();
    let mut at = 0;
    while at < size {
        match fs.lseek(&file, at, libc::SEEK_DATA) {
            Ok(data) => at = data / PAGE * PAGE,
            Err(error) => {
                assert_eq!(error, Errno::NXIO);
                break;
            }
        }
        let mut bytes = try_read(fs, &file, at, STEP as usize, false).expect("read");
        bytes.resize(bytes.len().next_multiple_of(PAGE as usize), 0);
        for (nth, page) in bytes.chunks(PAGE as usize).enumerate() {
            if page.iter().any(|&byte| byte != 0) {
                pages.insert(at / PAGE + nth as u64, crc32c::crc32c(page));
            }
        }
        at += STEP;
    }
    fs.release(&file);
    pages
}
