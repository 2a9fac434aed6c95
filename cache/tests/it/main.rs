//! The cache against simulated devices, through a backing that writes copies as the file system
//! does: contents, accounts, faults, policy, and threads against each other.

mod basics;
mod faults;
mod harness;
mod model;
mod policy;
mod resize;
mod stress;
