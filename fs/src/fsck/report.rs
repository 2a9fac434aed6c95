//! What a check found: problems by class, and counters.

/// What kind of thing is wrong. A class is repaired as a whole, or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// A copy of a label or of the chunk table.
    Label,
    /// A block of the journal.
    Journal,
    /// A page of the metadata store.
    Store,
    /// A record of an inode, or one that lacks what its type needs.
    Inode,
    /// Extended attributes and lists of access.
    Xattr,
    /// The list of inodes that wait for deletion.
    Orphan,
    /// A directory's entry, as found by name.
    Entry,
    /// A directory's entry, as listed.
    Listing,
    /// An inode that no name leads to.
    Lost,
    /// A file's extent.
    Extent,
    /// A block that two extents name.
    Shared,
    /// Free space.
    Space,
    /// Link counts, sizes, block counts, parents, flags.
    Count,
    /// Counters of the whole volume.
    Setting,
}

impl Class {
    /// All of them, in the order in which they are asked about.
    pub const ALL: [Class; 14] = [
        Class::Label,
        Class::Journal,
        Class::Store,
        Class::Inode,
        Class::Xattr,
        Class::Orphan,
        Class::Entry,
        Class::Listing,
        Class::Lost,
        Class::Extent,
        Class::Shared,
        Class::Space,
        Class::Count,
        Class::Setting,
    ];

    /// The word that reports use.
    pub fn name(self) -> &'static str {
        match self {
            Class::Label => "label",
            Class::Journal => "journal",
            Class::Store => "store",
            Class::Inode => "inode",
            Class::Xattr => "xattr",
            Class::Orphan => "orphan",
            Class::Entry => "entry",
            Class::Listing => "listing",
            Class::Lost => "lost",
            Class::Extent => "extent",
            Class::Shared => "shared",
            Class::Space => "space",
            Class::Count => "count",
            Class::Setting => "setting",
        }
    }

    /// What repairing it does, as a question.
    pub fn question(self) -> &'static str {
        match self {
            Class::Label => "Write damaged labels and chunk tables again",
            Class::Journal => "Drop what the journal holds from the damaged block on",
            Class::Store => "Build damaged tables anew from what can be read of them",
            Class::Inode => "Mend inode records, and remove those that cannot be",
            Class::Xattr => "Remove impossible attributes",
            Class::Orphan => "Mend the list of inodes to delete",
            Class::Entry => "Remove or mend entries that name nothing or the wrong thing",
            Class::Listing => "Make listings agree with the names",
            Class::Lost => "Move what no name leads to into lost+found",
            Class::Extent => "Cut extents to what can be",
            Class::Shared => "Give each file its own copy of shared blocks",
            Class::Space => "Set the free space right",
            Class::Count => "Set link counts, sizes and block counts right",
            Class::Setting => "Set the volume's counters right",
        }
    }

    /// Whether repairing it can lose nothing that anybody might still want: so it is done at boot.
    pub fn is_safe(self) -> bool {
        matches!(
            self,
            Class::Label | Class::Listing | Class::Space | Class::Count | Class::Setting
        )
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// What kind of thing.
    #[serde(rename = "kind")]
    pub class: Class,
    /// Which one: "inode 12", "block 4711".
    pub object: String,
    /// What was expected and what was found.
    pub message: String,
}

/// What a check saw.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// Inodes seen.
    pub inodes: u64,
    /// Directories among them.
    pub directories: u64,
    /// Directory entries.
    pub entries: u64,
    /// Extents.
    pub extents: u64,
    /// Blocks of data in extents.
    pub data_blocks: u64,
    /// Free blocks.
    pub free_blocks: u64,
    /// Blocks of all data chunks.
    pub chunk_blocks: u64,
    /// Inodes that wait for deletion.
    pub orphans: u64,
    /// How many problems there are.
    pub problem_count: u64,
    /// The problems, up to [`PROBLEMS_MAX`]; empty for a sound volume.
    pub problems: Vec<Problem>,
    /// How many there are of each class, in the order of [`Class::ALL`].
    #[serde(skip)]
    pub by_class: [u64; Class::ALL.len()],
}

/// More problems than this are counted, and not kept.
pub const PROBLEMS_MAX: usize = 10_000;

impl Report {
    /// Takes a problem in.
    pub(super) fn add(&mut self, class: Class, object: String, message: String) {
        self.problem_count += 1;
        self.by_class[class as usize] += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(Problem {
                class,
                object,
                message,
            });
        }
    }

    /// Whether nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.problem_count == 0
    }

    /// The classes that have problems.
    pub fn classes(&self) -> impl Iterator<Item = (Class, u64)> + '_ {
        let counted = Class::ALL.into_iter().zip(self.by_class);
        counted.filter(|&(_, count)| count > 0)
    }
}

/// A set of classes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Classes(u16);

impl Classes {
    /// All classes.
    pub(super) const ALL: Classes = Classes(u16::MAX);

    /// The set without any.
    pub(super) fn none() -> Self {
        Self::default()
    }

    /// Adds one.
    pub(super) fn add(&mut self, class: Class) {
        self.0 |= 1 << class as u16;
    }

    /// Takes all away.
    pub(super) fn clear(&mut self) {
        *self = Self::none();
    }

    /// Whether it is in the set.
    pub(super) fn has(self, class: Class) -> bool {
        self.0 & 1 << class as u16 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_are_numbered_in_order() {
        for (number, class) in Class::ALL.into_iter().enumerate() {
            assert_eq!(class as usize, number);
            let mut one = Classes::none();
            one.add(class);
            assert!(
                Class::ALL
                    .iter()
                    .all(|&other| one.has(other) == (other == class))
            );
            assert!(Classes::ALL.has(class));
        }
    }
}
