// How a source names the instances of its kernels' templates.
#pragma once

#define KERNEL(host, ...) template [[host_name(host)]] [[kernel]] decltype(__VA_ARGS__) __VA_ARGS__;
