// Files in the user's cache folder.
#pragma once

#include <filesystem>
#include <string>

namespace torch_fused {

// 64-bit FNV-1a as 16 hexadecimal digits.
std::string digest(const std::string& bytes);

// The folder of torch_fused/cache.py for `kind`, which need not exist.
std::filesystem::path cache_folder(const std::string& kind);

// The bytes given to save_kept, or "" if there is no such file, it was damaged, or its folder is another user's.
std::string load_kept(const std::filesystem::path& path);

// Creates the folder, not readable by other users, and the file in one step, so that other processes never read
// half of it. Removes files of killed processes. If the folder cannot be written, only time is lost.
void save_kept(const std::filesystem::path& path, const std::string& bytes);

}  // namespace torch_fused
