/* What torch_npu's libraries are linked against and this emulator does not do.
 *
 * No header is included: the names alone have to be there.  A call says its name once on stderr and
 * answers ACL_ERROR_FAILURE: torch_npu only warns of "not supported".
 */
#include <stdio.h>

#define UNSUPPORTED(name)                                                                  \
    int name(void);                                                                        \
    int name(void)                                                                         \
    {                                                                                      \
        static int said;                                                                   \
        if (!said++) fprintf(stderr, "CANN emulator: " #name " is not emulated\n");        \
        return 500001;                                                                      \
    }

/* Profiling: nobody listens. */
#define IGNORED(name) \
    int name(void);   \
    int name(void) { return 0; }

IGNORED(MsprofGetHashId)
IGNORED(MsprofRegisterCallback)
IGNORED(MsprofReportAdditionalInfo)
IGNORED(MsprofReportApi)
IGNORED(MsprofReportCompactInfo)
IGNORED(MsprofSysCycleTime)

/* Operators of CANN: the emulator's run in Python (`operators`), above these. */
UNSUPPORTED(aclCreateDataBuffer)
UNSUPPORTED(aclCreateTensorDesc)
UNSUPPORTED(aclDestroyDataBuffer)
UNSUPPORTED(aclDestroyTensorDesc)
UNSUPPORTED(aclGetTensorDescDimV2)
UNSUPPORTED(aclGetTensorDescFormat)
UNSUPPORTED(aclGetTensorDescNumDims)
UNSUPPORTED(aclGetTensorDescType)
UNSUPPORTED(aclSetTensorDescName)
UNSUPPORTED(aclSetTensorFormat)
UNSUPPORTED(aclSetTensorPlaceMent)
UNSUPPORTED(aclSetTensorShape)
UNSUPPORTED(aclopCompileAndExecute)
UNSUPPORTED(aclopCreateAttr)
UNSUPPORTED(aclopDestroyAttr)
UNSUPPORTED(aclopSetAttrBool)
UNSUPPORTED(aclopSetAttrDataType)
UNSUPPORTED(aclopSetAttrFloat)
UNSUPPORTED(aclopSetAttrInt)
UNSUPPORTED(aclopSetAttrListBool)
UNSUPPORTED(aclopSetAttrListFloat)
UNSUPPORTED(aclopSetAttrListInt)
UNSUPPORTED(aclopSetAttrListListInt)
UNSUPPORTED(aclopSetAttrString)

/* Kernels, dumps, sharing memory between processes and devices. */
UNSUPPORTED(aclmdlFinalizeDump)
UNSUPPORTED(aclmdlInitDump)
UNSUPPORTED(aclmdlSetDump)
UNSUPPORTED(aclrtBinaryGetFunction)
UNSUPPORTED(aclrtBinaryLoadFromData)
UNSUPPORTED(aclrtDeviceEnablePeerAccess)
UNSUPPORTED(aclrtDeviceGetBareTgid)
UNSUPPORTED(aclrtGetFunctionAddr)
UNSUPPORTED(aclrtMemExportToShareableHandle)
UNSUPPORTED(aclrtMemImportFromShareableHandle)
UNSUPPORTED(aclrtMemSetPidToShareableHandle)
UNSUPPORTED(aclrtProcessReport)
UNSUPPORTED(rtDevBinaryRegister)
UNSUPPORTED(rtFunctionRegister)
UNSUPPORTED(rtGetC2cCtrlAddr)
UNSUPPORTED(rtKernelLaunch)
