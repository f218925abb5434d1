// SPDX-License-Identifier: Apache-2.0
// See README.md of this folder.
#pragma once

namespace gloo::transport {

class Device;
class UnboundBuffer;

}  // namespace gloo::transport
